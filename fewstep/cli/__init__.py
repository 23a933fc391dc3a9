"""What the scripts run: one module for each verb that is not a library's own."""
