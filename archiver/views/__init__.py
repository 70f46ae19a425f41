"""Facts for people and programs, and their form as JSON, once for the command line and the API."""
