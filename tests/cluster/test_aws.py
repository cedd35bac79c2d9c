"""cluster/aws.yaml and cluster/aws/*.json: what the roles may do, who reaches the nodes, and what the bucket drops.

The nodes are launched by Ray's own code in a simulated account.
"""

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config

from tests.support.cluster.iam import ACCOUNT, BUCKET, REGION, Request, allows, aws_file, requests_of, statements
from tests.support.cluster.manifests import ROOT

GROUP = "sg-0123456789abcdef0"
MINE = "203.0.113.7"
POLICIES = ["bucket.json", "launch.json"]
READS_ONLY = {"ec2:DescribeInstances"}  # has no resources that a policy can name
INSTANCE = f"arn:aws:ec2:{REGION}:{ACCOUNT}:instance/i-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role"
TO_EC2 = {"iam:PassedToService": "ec2.amazonaws.com"}
LAUNCH = {
    "aws:RequestTag/ray-cluster-name": "bam",
    "ec2:MetadataHttpTokens": "required",
    "ec2:InstanceProfile": f"arn:aws:iam::{ACCOUNT}:instance-profile/bam-worker",
}
ESCALATIONS = [
    Request("iam:PassRole", f"{ROLE}/Administrator", TO_EC2),
    Request("iam:PassRole", f"{ROLE}/bam-head", TO_EC2),
    Request("iam:PassRole", f"{ROLE}/bam-worker-admin", TO_EC2),
    Request("iam:PassRole", f"{ROLE}/bam-worker", {"iam:PassedToService": "lambda.amazonaws.com"}),
    Request("iam:AttachRolePolicy", f"{ROLE}/bam-worker"),
    Request("iam:CreateAccessKey", f"arn:aws:iam::{ACCOUNT}:user/admin"),
    Request("sts:AssumeRole", f"{ROLE}/Administrator"),
    Request("ssm:GetParameters", f"arn:aws:ssm:{REGION}:{ACCOUNT}:parameter/database/password"),
    Request("ssm:SendCommand", INSTANCE),
    Request("ec2:ModifyInstanceAttribute", INSTANCE),
    Request("ec2:AssociateIamInstanceProfile", INSTANCE),
    Request("ec2:AuthorizeSecurityGroupIngress", f"arn:aws:ec2:{REGION}:{ACCOUNT}:security-group/{GROUP}"),
    Request("ec2:TerminateInstances", INSTANCE),
    Request("ec2:TerminateInstances", INSTANCE, {"aws:ResourceTag/ray-cluster-name": "another"}),
    Request("ec2:CreateTags", INSTANCE),  # the tag would make the instance one of the cluster
    Request("ec2:RunInstances", INSTANCE, LAUNCH | {"ec2:InstanceProfile": f"{ROLE}/Administrator"}),
    Request("ec2:RunInstances", INSTANCE, LAUNCH | {"ec2:MetadataHttpTokens": "optional"}),
    Request("ec2:RunInstances", INSTANCE, LAUNCH | {"aws:RequestTag/ray-cluster-name": "another"}),
    Request("ec2:RunInstances", f"arn:aws:ec2:{REGION}:{ACCOUNT}:volume/*", {"ec2:Encrypted": "false"}),
    Request("ec2:RunInstances", f"arn:aws:ec2:{REGION}:{ACCOUNT}:security-group/sg-open"),
    Request("ec2:RunInstances", f"arn:aws:ec2:{REGION}:{ACCOUNT}:key-pair/mine"),
    Request("s3:GetObject", "arn:aws:s3:::another-bucket/key"),
    Request("s3:GetObject", f"arn:aws:s3:::{BUCKET}-of-others/key"),
    Request("s3:ListAllMyBuckets", "*"),
    Request("s3:PutBucketPolicy", f"arn:aws:s3:::{BUCKET}"),
    Request("s3:PutLifecycleConfiguration", f"arn:aws:s3:::{BUCKET}"),
    Request("s3:DeleteBucket", f"arn:aws:s3:::{BUCKET}"),
]


def policy(name: str) -> Any:
    return aws_file(name, SECURITY_GROUP_ID=GROUP)


@pytest.mark.parametrize("name", POLICIES)
def test_actions_are_named_and_resources_are_limited(name: str) -> None:
    for statement in statements(policy(name)):
        assert not [action for action in statement["Action"] if "*" in action]
        if not set(statement["Action"]) <= READS_ONLY:
            for resource in statement["Resource"]:
                service, account, path = (resource.split(":", 5)[index] for index in (2, 4, 5))
                assert service and path.strip("*/:")  # never `*` or `arn:aws:...:*`
                assert account == ACCOUNT or service == "s3" or path.startswith(("image/", "parameter/aws/service/"))


@pytest.mark.parametrize("request_", ESCALATIONS, ids=lambda request: f"{request.action}-{request.resource[-20:]}")
def test_no_role_can_take_more_rights(request_: Request) -> None:
    assert not any(allows(policy(name), request_) for name in POLICIES)


def test_the_evaluator_finds_an_escalation() -> None:
    statement = {"Effect": "Allow", "Action": ["ec2:*", "iam:PassRole", "ssm:*", "s3:*"], "Resource": "*"}
    wide = {"Version": "2012-10-17", "Statement": [statement]}
    found = [request for request in ESCALATIONS if allows(wide, request)]
    assert {request.action.partition(":")[0] for request in found} == {"iam", "ssm", "ec2", "s3"}


def test_only_ec2_may_take_the_roles() -> None:
    (statement,) = aws_file("trust.json")["Statement"]
    assert statement == {
        "Effect": "Allow",
        "Principal": {"Service": "ec2.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }


# The permission that each operation of S3 needs
S3_ACTIONS = {
    "put_object": "s3:PutObject",
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "copy_object": "s3:PutObject",
    "delete_object": "s3:DeleteObject",
    "delete_objects": "s3:DeleteObject",
    "list_objects_v2": "s3:ListBucket",
    "head_bucket": "s3:ListBucket",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
    "list_parts": "s3:ListMultipartUploadParts",
}
OF_BUCKETS = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}
TRANSFERS = {"upload_file": ["put_object", "abort_multipart_upload"], "download_file": ["head_object", "get_object"]}


def operations_of_the_store() -> set[str]:
    """Return the operations of S3 that bam_ray/blobs uses: the methods of clients and the names of paginators."""
    model = botocore.session.get_session().get_service_model("s3")
    known = {botocore.xform_name(name) for name in model.operation_names}
    found = set()
    for path in Path(ROOT / "bam_ray/blobs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
            )
            found.update(TRANSFERS.get(name, [name] if name in known else []) if isinstance(name, str) else [])
    return found


def test_the_bucket_policy_allows_what_the_store_does() -> None:
    used = operations_of_the_store()
    assert {"put_object", "list_objects_v2", "complete_multipart_upload"} <= used
    for action in {S3_ACTIONS[operation] for operation in used}:
        resource = f"arn:aws:s3:::{BUCKET}" + ("" if action in OF_BUCKETS else "/runs/manifest.json")
        assert allows(policy("bucket.json"), Request(action, resource))
    granted = {action for statement in statements(policy("bucket.json")) for action in statement["Action"]}
    assert granted <= set(S3_ACTIONS.values())


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Simulate an AWS account with the security group of docs/clusters.md, and return a client of EC2."""
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the SSH key there
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with mock_aws():
        iam = boto3.client("iam")
        for role in ("bam-head", "bam-worker"):
            iam.create_instance_profile(InstanceProfileName=role)
        yield boto3.client("ec2", REGION)


def created_group(ec2: Any) -> str:
    """Create the security group with the rules of cluster/aws/ingress.json, and return its id."""
    vpc = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]["VpcId"]
    group: str = ec2.create_security_group(GroupName="bam", Description="bam", VpcId=vpc)["GroupId"]
    rules = aws_file("ingress.json", SECURITY_GROUP_ID=group, YOUR_ADDRESS=MINE)
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=rules)
    return group


def bootstrapped(group: str) -> Any:
    """Return the configuration as `ray up` completes it in the account."""
    text = (ROOT / "cluster/aws.yaml").read_text().replace("SECURITY_GROUP_ID", group)
    subnets = boto3.client("ec2", REGION).describe_subnets()["Subnets"]
    config = yaml.safe_load(text.replace("SUBNET_ID", subnets[0]["SubnetId"]))
    return bootstrap_aws(prepare_config(config))


def reaching(ec2: Any, group: str) -> dict[str, list[tuple[Any, Any]]]:
    """Return the sources that a security group admits, each with its ranges of ports."""
    sources: dict[str, list[tuple[Any, Any]]] = {}
    (found,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    for rule in found["IpPermissions"]:
        names = [peer["CidrIp"] for peer in rule["IpRanges"]] + [peer["CidrIpv6"] for peer in rule["Ipv6Ranges"]]
        names += [peer["GroupId"] for peer in rule["UserIdGroupPairs"]] + rule["PrefixListIds"]
        for name in names:
            sources.setdefault(name, []).append((rule.get("FromPort"), rule.get("ToPort")))
    return sources


def test_only_the_nodes_and_one_address_reach_a_node(account: Any) -> None:
    group = created_group(account)
    for kind in bootstrapped(group)["available_node_types"].values():
        assert kind["node_config"]["KeyName"] == "bam"  # Ray's default key opens the nodes of all clusters
        groups = kind["node_config"]["SecurityGroupIds"]
        assert [reaching(account, each) for each in groups] == [{group: [(None, None)], f"{MINE}/32": [(22, 22)]}]


def test_a_file_without_the_group_starts_nothing(account: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        bootstrapped("SECURITY_GROUP_ID")
    assert "Failed to detect a security group" in capsys.readouterr().err
    config = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())
    del config["available_node_types"]["mix-a100"]  # Ray itself refuses network interfaces without a group
    for kind in config["available_node_types"].values():
        del kind["node_config"]["SecurityGroupIds"]
    opened = bootstrap_aws(prepare_config(config))["available_node_types"]["head"]["node_config"]["SecurityGroupIds"]
    assert "0.0.0.0/0" in reaching(account, opened[0])  # why the file names a group


def test_the_head_may_do_what_the_autoscaler_does(account: Any) -> None:
    group = created_group(account)
    config = bootstrapped(group)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    calls: list[tuple[str, dict[str, Any]]] = []
    events = provider.ec2.meta.client.meta.events, provider.ec2_fail_fast.meta.client.meta.events

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        calls.append((model.name, copy.deepcopy(params)))

    for each in events:
        each.register("provide-client-params.ec2.*", note)
    for name in ("spot-l40s", "spot-l4", "mix-a100"):
        node_config = config["available_node_types"][name]["node_config"]
        tags = {"ray-node-type": "worker", "ray-node-name": "bam-worker", "ray-user-node-type": name}
        (node,) = provider.create_node(node_config, tags, 1)
        assert provider.non_terminated_nodes({}) == [node]
        provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
        assert provider.is_running(node) and provider.internal_ip(node)
        (instance,) = account.describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"]
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        volumes = [disk["Ebs"]["VolumeId"] for disk in instance["BlockDeviceMappings"]]
        assert all(volume["Encrypted"] for volume in account.describe_volumes(VolumeIds=volumes)["Volumes"])
        provider.terminate_node(node)
        assert provider.non_terminated_nodes({}) == []
    assert {"RunInstances", "CreateTags", "DescribeInstances", "TerminateInstances"} == {name for name, _ in calls}
    head = aws_file("launch.json", SECURITY_GROUP_ID=group)
    asked = [each for name, given in calls for each in requests_of(name, given, {"ray-cluster-name": "bam"})]
    assert [request for request in asked if not allows(head, request)] == []


@pytest.mark.parametrize("kind", ["head", "spot-l40s", "spot-l4", "mix-a100"])
def test_nodes_have_private_metadata_and_encrypted_disks(kind: str) -> None:
    node = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())["available_node_types"][kind]["node_config"]
    assert node["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
    assert node["IamInstanceProfile"] == {"Name": "bam-head" if kind == "head" else "bam-worker"}
    assert node["BlockDeviceMappings"] and all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])


def test_the_bucket_drops_unfinished_uploads_and_old_versions(account: Any) -> None:
    lifecycle = aws_file("lifecycle.json")
    given = {"Bucket": BUCKET, "LifecycleConfiguration": lifecycle}
    model = botocore.session.get_session().get_service_model("s3")
    shape = model.operation_model("PutBucketLifecycleConfiguration").input_shape
    assert not ParamValidator().validate(given, shape).has_errors()
    s3 = boto3.client("s3", REGION)
    s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
    s3.put_bucket_lifecycle_configuration(**given)
    rules = s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert all(rule["Status"] == "Enabled" and rule["Filter"] == {"Prefix": ""} for rule in rules)
    days = [rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] for rule in rules if len(rule) == 4]
    days += [rule["NoncurrentVersionExpiration"]["NoncurrentDays"] for rule in rules if len(rule) == 5]
    assert days == [7, 7]
    assert all("Days" not in rule.get("Expiration", {}) for rule in rules)  # nothing that a run uses expires
