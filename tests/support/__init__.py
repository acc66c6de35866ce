"""What tests share and run, and no tests."""
