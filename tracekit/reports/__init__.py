"""What people read: tables, charts and named queries over what the metrics computed."""
