"""Working together with other libraries, one module each."""
