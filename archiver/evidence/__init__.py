"""The proof: an account's journal, and the check of objects, journal and database against each other."""
