"""Names of the objects that the JuiceFS CSI driver installs."""

from __future__ import annotations

from include.juicefs_storage.ports import WorkloadKind

CSI_WORKLOADS: tuple[tuple[WorkloadKind, str], ...] = (
    ("StatefulSet", "juicefs-csi-controller"),
    ("DaemonSet", "juicefs-csi-node"),
)
CSI_CONTAINER = "juicefs-plugin"
CSI_CONFIG_MAP = "juicefs-csi-driver-config"
CSI_CONTROLLER_SELECTOR, CSI_NODE_SELECTOR = "app=juicefs-csi-controller", "app=juicefs-csi-node"
