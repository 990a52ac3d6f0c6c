"""The container image of deploy/container, as podman runs it: needs root, podman, and the image."""
