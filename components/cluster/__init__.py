"""What the steps use of a Kubernetes cluster. Nothing here is a step; `latentac` knows nothing of it."""
