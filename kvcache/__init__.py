"""Placement and the faces people use: broker, client, CLI. Importing this never imports torch."""
