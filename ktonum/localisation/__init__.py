"""What a failing tensor's error looks like, and where it is."""
