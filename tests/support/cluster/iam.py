"""A small evaluator of IAM policies, and the requests that Ray's node provider for AWS makes.

It knows the operators of cluster/aws/*.json and denies everything that no statement allows. A policy that uses anything
else (Deny, NotAction, another operator) is refused, so that it is not evaluated wrongly.
"""

import fnmatch
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.cluster.manifests import ROOT

REGION = "us-west-2"
ACCOUNT = "123456789012"  # the account of moto
BUCKET = "a-bucket"
OPERATORS = {"StringEquals", "ArnEquals", "Bool"}
STATEMENT = {"Sid", "Effect", "Action", "Resource", "Condition"}


def aws_file(name: str, **replaced: str) -> Any:
    """Load a file of cluster/aws, with the placeholders replaced like docs/clusters.md does."""
    text = (ROOT / "cluster/aws" / name).read_text()
    for placeholder, value in ({"ACCOUNT_ID": ACCOUNT, "BUCKET": BUCKET} | replaced).items():
        text = text.replace(placeholder, value)
    return json.loads(text)


@dataclass(frozen=True)
class Request:
    """One question to IAM: may this action be done to this resource? The context has the condition keys."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


def statements(policy: Any) -> list[dict[str, Any]]:
    """Return the statements of a policy, with actions and resources as lists."""
    assert policy["Version"] == "2012-10-17"
    found = []
    for statement in policy["Statement"]:
        assert set(statement) <= STATEMENT
        assert statement["Effect"] == "Allow"
        assert set(statement.get("Condition", {})) <= OPERATORS
        found.append(statement | {name: _listed(statement[name]) for name in ("Action", "Resource")})
    return found


def allows(policy: Any, request: Request) -> bool:
    """Return True if a statement of the policy allows the request."""
    return any(_matches(statement, request) for statement in statements(policy))


def _matches(statement: dict[str, Any], request: Request) -> bool:
    wanted = {key: value for keys in statement.get("Condition", {}).values() for key, value in keys.items()}
    return (
        any(fnmatch.fnmatchcase(request.action.lower(), pattern.lower()) for pattern in statement["Action"])
        and any(fnmatch.fnmatchcase(request.resource, pattern) for pattern in statement["Resource"])
        and all(request.context.get(key) in _listed(value) for key, value in wanted.items())
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def requests_of(operation: str, parameters: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[Request]:
    """Return what IAM is asked when EC2 receives an operation; `tags` are those of the instances that it names."""
    region = {"aws:RequestedRegion": REGION}
    if operation == "RunInstances":
        yield from _launch(parameters)
    elif operation == "CreateTags":
        context = region | {f"aws:ResourceTag/{key}": value for key, value in tags.items()}
        yield from (Request("ec2:CreateTags", _arn(f"instance/{name}"), context) for name in parameters["Resources"])
    elif operation == "TerminateInstances":
        context = region | {f"aws:ResourceTag/{key}": value for key, value in tags.items()}
        names = parameters["InstanceIds"]
        yield from (Request("ec2:TerminateInstances", _arn(f"instance/{name}"), context) for name in names)
    else:
        yield Request(f"ec2:{operation}", "*", region)


def _launch(parameters: Mapping[str, Any]) -> Iterator[Request]:
    (specification,) = parameters["TagSpecifications"]
    profile = parameters["IamInstanceProfile"]["Name"]
    instance = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in specification["Tags"]}
    instance["ec2:MetadataHttpTokens"] = parameters.get("MetadataOptions", {}).get("HttpTokens", "optional")
    instance["ec2:InstanceProfile"] = f"arn:aws:iam::{ACCOUNT}:instance-profile/{profile}"
    yield Request("ec2:RunInstances", _arn("instance/*"), instance)
    yield Request("ec2:CreateTags", _arn("instance/*"), {"ec2:CreateAction": "RunInstances"})
    for disk in parameters["BlockDeviceMappings"]:
        encrypted = str(disk["Ebs"].get("Encrypted", False)).lower()
        yield Request("ec2:RunInstances", _arn("volume/*"), {"ec2:Encrypted": encrypted})
    # A node has one network interface, with these or with its own settings
    network = parameters.get("NetworkInterfaces", [{**parameters, "Groups": parameters.get("SecurityGroupIds")}])
    for interface in network:
        for used in (*(f"security-group/{group}" for group in interface["Groups"]), f"subnet/{interface['SubnetId']}"):
            yield Request("ec2:RunInstances", _arn(used))
    for used in (f"key-pair/{parameters['KeyName']}", "network-interface/*"):
        yield Request("ec2:RunInstances", _arn(used))
    if "Placement" in parameters:
        yield Request("ec2:RunInstances", _arn(f"placement-group/{parameters['Placement']['GroupName']}"))
    if "InstanceMarketOptions" in parameters:
        yield Request("ec2:RunInstances", _arn("spot-instances-request/*"))
    yield Request("ec2:RunInstances", f"arn:aws:ec2:{REGION}::image/ami-12345678")
    parameter = parameters["ImageId"].removeprefix("resolve:ssm:")
    yield Request("ssm:GetParameters", f"arn:aws:ssm:{REGION}::parameter{parameter}")
    role = f"arn:aws:iam::{ACCOUNT}:role/{profile}"
    yield Request("iam:PassRole", role, {"iam:PassedToService": "ec2.amazonaws.com"})


def _arn(resource: str) -> str:
    return f"arn:aws:ec2:{REGION}:{ACCOUNT}:{resource}"
