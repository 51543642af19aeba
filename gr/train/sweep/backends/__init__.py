"""Where a sweep's members are trained.  A backend starts a command somewhere and waits for its end."""
