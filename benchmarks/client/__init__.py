"""The client: the folder command and the library below it, beside what users have without them."""
