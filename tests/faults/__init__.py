"""What goes wrong, and what is promised then: docs/reliability.md is the table of these tests."""
