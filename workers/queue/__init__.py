"""What enters and leaves Redis: the app, messages, lanes, feeding. Knows no model and no image."""
