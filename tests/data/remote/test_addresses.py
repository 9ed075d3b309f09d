"""The one name of an object at an address: equal for its spellings and signatures, and for nothing else."""

import pytest

from eve_ds.data.remote.addresses import encoded, object_name

SAME = {
    "https://host/set/a.tar": [
        "HTTPS://HOST/set/a.tar",
        "https://host:443/set/a.tar",
        "https://user:pa%2Fss@host/set/a.tar",
        "https://host/set/./.././set/a.tar",
        "https://host/%73et/a%2Etar",
        "https://host/set/a.tar#part",
        "https://host/set/a.tar?",
        "https://host/set/a.tar?X-Amz-Algorithm=A&X-Amz-Credential=k%2F1&X-Amz-Expires=9&x-amz-signature=s",
        "https://host/set/a.tar?AWSAccessKeyId=k&Signature=s%3D&Expires=170000000",
        "https://host/set/a.tar?GoogleAccessId=k&Expires=1&Signature=s",
        "https://host/set/a.tar?X-Goog-Algorithm=A&X-Goog-Date=D&X-Goog-SignedHeaders=host&X-Goog-Signature=s",
        "https://host/set/a.tar?Policy=p_&Signature=s~&Key-Pair-Id=K",
        "https://host/set/a.tar?sv=2024-11-04&ss=b&srt=o&sp=r&se=2030-01-01T00%3A00Z&st=1&spr=https&sr=b&sig=s%2B",
        "https://host/set/a.tar?skoid=1&sktid=2&skt=3&ske=4&sks=b&skv=5&sig=s",
        "https://host/set/a.tar?OSSAccessKeyId=k&Expires=1&Signature=s&security-token=t",
        "https://host/set/a.tar?q-sign-algorithm=sha1&q-ak=k&q-sign-time=1&q-key-time=1&q-header-list=host&"
        "q-url-param-list=&q-signature=s",
        "https://host/set/a.tar?token=t",
        "https://host/set/a.tar?hdnts=exp=1~hmac=2",
        "https://host/set/a.tar?response-content-disposition=attachment&Expires=1&Signature=s&Key-Pair-Id=K",
    ],
    "https://host/get.tar?id=1&part=a b": [
        "https://host/get.tar?part=a%20b&id=1",
        "https://host/get.tar?id=1&part=a+b&sig=s&se=1",
        "https://user@host/./get.tar?id=%31&X-Amz-Signature=s&part=a+b",
    ],
    "http://[::1]:8000/a b.tar": ["http://user:secret@[::1]:8000/a%20b.tar"],
    "http://host/a%2Fb.tar": ["http://host/a%2fb.tar"],
    "s3://bucket/set/a b?[1].tar": ["S3://key:secret@bucket/set/a b?[1].tar"],
    "gs://bucket/a.tar": ["gcs://bucket/a.tar"],
    "http://host/\udc80\ud800.tar": ["http://HOST/\udc80\ud800.tar"],
}
OTHERS = [
    "http://host/set/a.tar",
    "https://other/set/a.tar",
    "https://host:8443/set/a.tar",
    "https://host/set/A.tar",
    "https://host/set//a.tar",
    "https://host/set%2Fa.tar",
    "https://host/set/a.tar?versionId=1",
    "https://host/set/a.tar?versionId=2",
    "https://host/set/a.tar?key=1",
    "https://host/set/a.tar?se=1",
    "https://host/set/a.tar?id=1&id=2",
    "https://host/set/a.tar?id=2&id=1",
    "s3://bucket/set/a.tar",
    "s3://bucket/set/./a.tar",
    "s3://bucket/set/%61.tar",
    "gs://bucket/set/a.tar",
]


@pytest.mark.parametrize(("address", "spelling"), [(address, other) for address in SAME for other in SAME[address]])
def test_spellings_and_signatures_of_one_object_have_one_name(address, spelling):
    assert object_name(spelling) == object_name(address)


def test_objects_that_differ_have_names_of_their_own():
    names = [object_name(address) for address in [*SAME, *OTHERS]]
    assert len(set(names)) == len(names)
    assert "secret" not in object_name("https://user:secret@host/a.tar?sig=secret&token=secret")


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("http://host/my set/it's.tar?sig=a b", "http://host/my%20set/it's.tar?sig=a%20b"),
        ('http://host/"a".tar', "http://host/%22a%22.tar"),
        ("http://host/a%20b+ü.tar", "http://host/a%20b+ü.tar"),
        ("s3://bucket/my set/a.tar", "s3://bucket/my set/a.tar"),
    ],
)
def test_white_space_in_an_address_of_http_is_encoded_once(address, sent):
    assert encoded(address) == encoded(encoded(address)) == sent
