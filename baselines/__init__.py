"""The other contestants, on peft and torch. See `suites.methods` for the contract."""
