"""Programs as graphs: capture, guard, lower."""
