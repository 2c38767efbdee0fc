"""What a manifest may hold, as JSON schemas: a misspelt field, a missing one or one of the wrong kind is a fault.

The fields are those of JobSet v1alpha2 (jobset.sigs.k8s.io, reference), of the parts of Kubernetes' Job, pod and claim
that a training needs, and of a SkyPilot task (docs.skypilot.co, YAML reference).
"""

WORD, NUMBER, SWITCH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
WORDS = {"type": "object", "additionalProperties": WORD}


def fields(required=(), /, **properties):
    """An object of these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def several(item):
    return {"type": "array", "items": item, "minItems": 1}


METADATA = fields(["name"], name={"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}, annotations=WORDS)
AMOUNT = {"type": ["integer", "string"]}
CONTAINER = fields(
    ["name", "image"],
    name=WORD,
    image=WORD,
    command=several(WORD),
    args=several(WORD),
    env=several(fields(["name"], name=WORD, value=WORD, valueFrom={"type": "object"})),
    ports=several(fields(["containerPort"], containerPort=NUMBER, name=WORD)),
    resources=fields(
        limits={"type": "object", "additionalProperties": AMOUNT},
        requests={"type": "object", "additionalProperties": AMOUNT},
    ),
    volumeMounts=several(fields(["name", "mountPath"], name=WORD, mountPath=WORD, subPath=WORD)),
)
POD = fields(
    ["containers", "restartPolicy"],
    containers=several(CONTAINER),
    restartPolicy={"enum": ["Never", "OnFailure"]},  # a Job's pod may not have Always
    terminationGracePeriodSeconds=NUMBER,
    nodeSelector=WORDS,
    serviceAccountName=WORD,
    volumes=several(
        fields(
            ["name"],
            name=WORD,
            persistentVolumeClaim=fields(["claimName"], claimName=WORD),
            emptyDir=fields(medium={"enum": ["", "Memory"]}, sizeLimit=AMOUNT),
        )
    ),
)
JOB = fields(
    ["template"],
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    completions=NUMBER,
    parallelism=NUMBER,
    backoffLimit=NUMBER,
    template=fields(["spec"], metadata={"type": "object"}, spec=POD),
)
JOBSET = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=METADATA,
    spec=fields(
        ["replicatedJobs"],
        replicatedJobs=several(
            fields(
                ["name", "template"],
                name=WORD,
                groupName=WORD,
                replicas=NUMBER,
                template=fields(["spec"], metadata={"type": "object"}, spec=JOB),
            )
        ),
        failurePolicy=fields(
            maxRestarts=NUMBER,
            restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
            rules={"type": "array"},
        ),
        network=fields(enableDNSHostnames=SWITCH, subdomain=WORD, publishNotReadyAddresses=SWITCH),
        successPolicy={"type": "object"},
        startupPolicy={"type": "object"},
        suspend=SWITCH,
        coordinator=fields(["replicatedJob"], replicatedJob=WORD, jobIndex=NUMBER, podIndex=NUMBER),
        managedBy=WORD,
        ttlSecondsAfterFinished=NUMBER,
    ),
)
CLAIM = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "v1"},
    kind={"const": "PersistentVolumeClaim"},
    metadata=METADATA,
    spec=fields(
        ["accessModes", "resources"],
        accessModes=several({"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]}),
        storageClassName=WORD,
        resources=fields(["requests"], requests=fields(["storage"], storage=WORD)),
    ),
)
SKYPILOT = fields(
    ["run"],
    name=WORD,
    workdir=WORD,
    num_nodes=NUMBER,
    resources=fields(
        accelerators={"anyOf": [WORD, {"type": "object", "additionalProperties": {"type": "number"}}]},
        accelerator_args={"type": "object"},
        use_spot=SWITCH,
        job_recovery=fields(strategy=WORD, max_restarts_on_errors=NUMBER, recover_on_exit_codes={}),
        infra=WORD,
        disk_size={"type": ["integer", "string"]},
    ),
    envs={
        "type": "object",
        "patternProperties": {"^[a-zA-Z_][a-zA-Z0-9_]*$": {"type": ["string", "null"]}},
        "additionalProperties": False,
    },
    file_mounts={
        "type": "object",
        "additionalProperties": fields(
            name=WORD, source=WORD, store=WORD, persistent=SWITCH, mode={"enum": ["MOUNT", "COPY", "MOUNT_CACHED"]}
        ),
    },
    setup=WORD,
    run=WORD,
)
