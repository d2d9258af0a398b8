"""A Kubernetes API server over HTTPS in which a JuiceFS CSI installation lives: test equipment for one machine.

Objects live in memory, pods are mount and process namespaces on this machine, and mount pods run the real
`juicefs`. `lab.kube.client.KubeServer` is how the lab and the tests start and steer it; `kubectl` and the
Kubernetes clients talk to it as to any cluster.
"""
