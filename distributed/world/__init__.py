"""The world of ranks: process groups, their collectives, the network between them, and ranks on this machine."""
