"""Files elsewhere: object stores, the Hugging Face Hub and web servers, read by range and kept in the cache."""
