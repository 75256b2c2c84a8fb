"""Where and how a cluster of Cerebras systems runs a job: the section `cluster` of a run."""

from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass


@dataclass(config=ConfigDict(strict=True))
class Cluster:
    """Cerebras systems

    Fields of `cerebras.pytorch`'s ClusterConfig, backend and flags, by their names there; null is
    the package's default, or the cluster's. The number of systems is num_systems.

    Args:
        mgmt_address: host:port of the cluster's management; null: as the user node is set up
        mgmt_namespace: which of the cluster's sessions to use
        credentials_path: certificate of the management
        mount_dirs: folders that input workers see, with code and data; null: all the cluster has
        python_paths: folders that input workers import from, beside this program's
        num_workers_per_csx: input workers for each system
        max_wgt_servers: most servers that hold weights
        max_act_per_csx: most servers for activations of each system
        job_labels: key=value labels
        job_priority: p1, p2 or p3
        job_time_sec: limit for a job
        disable_version_check: do not compare the versions of package and cluster
        compile_dir: folder in which the cluster keeps what it compiled
        compile_crd_memory_gi: GiB for the job that compiles
        execute_crd_memory_gi: GiB for the job that runs
        validate_only: trace and lower a step on this machine, ask no cluster, and end
        compile_only: compile a step on the cluster, and end
    """

    mgmt_address: str | None = None
    mgmt_namespace: str | None = None
    credentials_path: str | None = None
    mount_dirs: list[str] | None = None
    python_paths: list[str] | None = None
    num_workers_per_csx: PositiveInt | None = None
    max_wgt_servers: PositiveInt | None = None
    max_act_per_csx: PositiveInt | None = None
    job_labels: list[str] | None = None
    job_priority: str | None = None
    job_time_sec: PositiveInt | None = None
    disable_version_check: bool | None = None
    compile_dir: str | None = None
    compile_crd_memory_gi: PositiveInt | None = None
    execute_crd_memory_gi: PositiveInt | None = None
    validate_only: bool = False
    compile_only: bool = False

    def __post_init__(self):
        if self.validate_only and self.compile_only:
            raise ValueError("cluster.validate_only and cluster.compile_only: use one of them")
