"""Problems with answers or tests that verifiers check, read from the rows of public data sets."""
