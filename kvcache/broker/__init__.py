"""The broker process: `core` decides, `shell` owns the sockets; holds nothing its peers could not tell it again."""
