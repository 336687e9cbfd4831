"""A user's table and images: read, checked and selected before anything is planned."""
