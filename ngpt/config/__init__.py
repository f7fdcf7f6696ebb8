"""Settings: what they are (schema), whether they make sense (validate), where they come from (compose)."""
