"""What the networks run on besides plain torch."""
