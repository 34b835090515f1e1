"""What decodes for a server: in the server's process, or in one of its own. Nothing here knows of HTTP."""
