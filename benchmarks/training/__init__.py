"""What training costs beside the network."""
