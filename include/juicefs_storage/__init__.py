"""Move the object storage behind live JuiceFS volumes on Kubernetes."""
