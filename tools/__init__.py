"""Programs that development needs: a MinIO server, Go, docker, and the programs of the test node."""
