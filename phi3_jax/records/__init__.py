"""What commands leave on disk: whole files, JSON, and who owns a folder that is being written."""
