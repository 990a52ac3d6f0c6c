"""The stages of a request, each beside stock's: reading and writing, preprocessing, export."""
