"""The models: configs, blocks, and MEGABYTE itself."""
