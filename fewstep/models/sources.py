"""The files that each model is made of: which repo, which commit, which bytes.

Sizes and hashes that two public sources agree on are pinned. Where they are open, what the hub states of that
commit at download time is taken and recorded. Only safetensors, JSON and text: a pickle is never fetched.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repo, and its place in `weights/<name>/`."""

    path: str
    place: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """What is taken from one repo of the Hugging Face hub, at one commit."""

    name: str  # owner/repo
    revision: str  # a full commit hash, so that it can never mean other bytes
    licence: str
    files: tuple[HubFile, ...]

    @property
    def link(self) -> str:
        """The page where the licence stands."""
        return f"https://huggingface.co/{self.name}"


LCM_LORA = "lcm_lora.safetensors"
TINY_VAE = "vae_tiny"


def _repo(table: str) -> HubRepo:
    """Read a table: a row for the repo (name, commit, licence), and one for each file: path, size, sha256 ("-"
    where it is open), and its place if that is not the path without "fp16"."""
    head, *rows = table.strip().splitlines()
    files = []
    for row in rows:
        path, size, sha256, *places = row.split()
        place = places[0] if places else path.replace(".fp16.safetensors", ".safetensors")
        pins = None if size == "-" else int(size), None if sha256 == "-" else sha256
        files.append(HubFile(path, place, *pins))
    name, revision, licence = head.split(maxsplit=2)
    return HubRepo(name, revision, licence, tuple(files))


_SDXL_BASE = _repo(
    """
stabilityai/stable-diffusion-xl-base-1.0 462165984030d82259a11f4367a4eed129e94a7b CreativeML Open RAIL++-M
scheduler/scheduler_config.json                      479 af3e45a949aff8b8341ab8b811429ec03fee857a700a1d9477363e4fff9666e2
text_encoder/config.json                             565 39b8b2e4b1949e36969caa425b6c81c68bace99198dd9078ce05d16ad401fe7f
text_encoder/model.fp16.safetensors            246144152 660c6f5b1abae9dc498ac2d21e1347d2abdb0cf6c0c0c8576cd796491d9a6cdd
text_encoder_2/config.json                           575 a892d1c3a69a7e9247a24de2bc1d5891e3109a54696e53be20093af671072c34
text_encoder_2/model.fp16.safetensors         1389382176 ec310df2af79c318e24d20511b601a591ca8cd4f1fce1d8dff822a356bcdb1f4
tokenizer/merges.txt                              524619 9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a
tokenizer/vocab.json                             1059962 e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349
tokenizer/special_tokens_map.json                    472 c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac
tokenizer/tokenizer_config.json                      737 19d7b034cb0cc3ce9766c2231373ab8aa8991fc72e2c8f76558bfaae3de0d563
tokenizer_2/merges.txt                            524619 9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a
tokenizer_2/vocab.json                           1059962 e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349
tokenizer_2/special_tokens_map.json                  460 f118ab3a983206e4f32583448de6bd6aae4ee21869135cef1f5848a753cdaab6
tokenizer_2/tokenizer_config.json                    725 c9d23941f76a41cbd50eda9290f57be7828f0a7a677939e9ef181f7e12bd1bdf
unet/config.json                                    1680 30ebc70750223e59006f7f2b4e1e6c102570aa19a9c4ae3e1fbe7591332dbae6
unet/diffusion_pytorch_model.fp16.safetensors 5135149760 83e012a805b84c7ca28e5646747c90a243c65c8ba4f070e2d7ddc9d74661e139
"""
)

# SDXL's own VAE overflows in fp16; this one generates the same and does not.
_SDXL_VAE = _repo(
    """
madebyollin/sdxl-vae-fp16-fix 207b116dae70ace3637169f1ddd2434b91b3a8cd MIT
config.json                                631 f18b16fa4381c90ab44a3d7abd2e90afd05a2c31b8ca69998bc93c6453aeb7b7 vae/config.json
diffusion_pytorch_model.safetensors  334643238 1b909373b28f2137098b0fd9dbc6f97f8410854f31f84ddc9fa04b077b0ace2c vae/diffusion_pytorch_model.safetensors
"""
)

# These decode the same latents in a small part of the time, and lose fine detail: FEWSTEP_VAE=tiny.
_TAESDXL = _repo(
    """
madebyollin/taesdxl b20258aaef75ef61e659c1e0f14f251cf0ad153e MIT
config.json                                  - - vae_tiny/config.json
diffusion_pytorch_model.safetensors    9793292 ff4824aca94dd6111e0340fa749347fb74101060d9712cb5ef1ca8f1cf17502f vae_tiny/diffusion_pytorch_model.safetensors
"""
)
_TAESD = _repo(
    """
madebyollin/taesd 614f76814bbe30edbe2e627ace1c2234c81a2c0e MIT
config.json                                  - - vae_tiny/config.json
diffusion_pytorch_model.safetensors    9793292 db169d69145ec4ff064e49d99c95fa05d3eb04ee453de35824a6d0f325513549 vae_tiny/diffusion_pytorch_model.safetensors
"""
)

_SSD_1B = _repo(
    """
segmind/SSD-1B 60987f37e94cd59c36b1cba832b9f97b57395a10 Apache-2.0
scheduler/scheduler_config.json                        - -
text_encoder/config.json                               - -
text_encoder/model.fp16.safetensors                    - -
text_encoder_2/config.json                             - -
text_encoder_2/model.fp16.safetensors                  - d3df577f6e3799c8e1bd9b40e30133710e02e8e25d0ce48cdcc790e7dfe12d6d
tokenizer/merges.txt                              524619 9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a
tokenizer/vocab.json                             1059962 e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349
tokenizer/special_tokens_map.json                      - -
tokenizer/tokenizer_config.json                        - -
tokenizer_2/merges.txt                            524619 9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a
tokenizer_2/vocab.json                           1059962 e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349
tokenizer_2/special_tokens_map.json                    - -
tokenizer_2/tokenizer_config.json                      - -
unet/config.json                                       - -
unet/diffusion_pytorch_model.fp16.safetensors          - 40d8ea9159f3e875278dacc7879442d58c45850cf13c62f5e26681061c51829a
"""
)

_SD15_BASE = _repo(
    """
stable-diffusion-v1-5/stable-diffusion-v1-5 451f4fe16113bff5a5d2269ed5ad43b0592e9a14 CreativeML OpenRAIL-M
scheduler/scheduler_config.json                      308 699cce92eb7c122e2eb7dfdea78e6187fda76a5ed4a8e42319b85610e620e091
text_encoder/config.json                             617 845df614cb9327ae7bbea027316246fae917827407da6df13572e41b5f93b4cc
text_encoder/model.fp16.safetensors            246144864 77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e
tokenizer/merges.txt                              524619 9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a
tokenizer/vocab.json                             1059962 e089ad92ba36837a0d31433e555c8f45fe601ab5c221d4f607ded32d9f7a4349
tokenizer/special_tokens_map.json                    472 c4864a9376a8401918425bed71fc14fc0e81f9b59ec45c1cf96cccb2df508eac
tokenizer/tokenizer_config.json                      806 00439066fcba73de57644cf41e4e3b9f2dbb09d7f3fc2005898ba52399045882
unet/config.json                                     743 78f474de6bab3d893868f37be97b636ae65c0df3073ed3256ca458ff599b5f96
unet/diffusion_pytorch_model.fp16.safetensors 1719125304 c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21
vae/config.json                                      547 786a7d21647ddea6a04b9675c03d3cb45e90a2f3c6da5fbda2c54ade040036de
vae/diffusion_pytorch_model.fp16.safetensors   167335342 4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c
"""
)

# The checker's own repo holds a pickle; this one holds the same weights as safetensors.
_SAFETY_CHECKER = _repo(
    """
stable-diffusion-v1-5/stable-diffusion-v1-5 451f4fe16113bff5a5d2269ed5ad43b0592e9a14 CreativeML OpenRAIL-M
feature_extractor/preprocessor_config.json        342 2a1da83b5e1032aaeef397552ddb408dca0d8cd1dc58f61bf6abf38d6f33a0a2
safety_checker/config.json                       4723 5dd77a06cbd9b155060bd58deb81ffd1aafc1c6d7970acac674c1128bd4edfe2
safety_checker/model.fp16.safetensors       608018440 08902f19b1cfebd7c989f152fc0507bef6898c706a91d666509383122324b511
"""
)
_SAFETY_CLASSIFIER = _repo(
    """
Falconsai/nsfw_image_detection 96cb0d0342c7afb80cab76ecc58b265fa44da256 Apache-2.0
config.json                     724 - safety_classifier/config.json
preprocessor_config.json        325 - safety_classifier/preprocessor_config.json
model.safetensors         343223968 97b2ce64ec146884b37f98ee7944ca4891aa72f6827dc0cb10684a1cbecd5830 safety_classifier/model.safetensors
"""
)

# Its own text encoder and VAE are confirmed as safetensors on a side branch only, so its ancestor's are
# taken: the text encoder is said to be the same, and the VAE is of the same latents.
_LCM_DREAMSHAPER = _repo(
    """
SimianLuo/LCM_Dreamshaper_v7 a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5 MIT
LCM_Dreamshaper_v7_4k.safetensors 3438495296 84feab3a32f1d36108b762b25dad483ca9e37f719b23e0cfd0fdc4ad3fd5409b unet/diffusion_pytorch_model.safetensors
unet/config.json                           - -
"""
)
_SD15_FOR_LCM_DREAMSHAPER = replace(
    _SD15_BASE, files=tuple(file for file in _SD15_BASE.files if not file.place.startswith("unet/"))
)
_LCM_LORA_SDXL = _repo(
    """
latent-consistency/lcm-lora-sdxl a18548dd4956b174ec5b0d78d340c8dae0a129cd CreativeML Open RAIL++-M
pytorch_lora_weights.safetensors  393855224 a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141 lcm_lora.safetensors
"""
)
_LCM_LORA_SSD_1B = _repo(
    """
latent-consistency/lcm-lora-ssd-1b 857c372dbe0edd8af6255638a68d0d7ccb7a3d76 CreativeML Open RAIL++-M
pytorch_lora_weights.safetensors  209991222 7adaaa69db6f011058a19fd1d5315fdf19ef79fcd513cdab30e173833fd5c59b lcm_lora.safetensors
"""
)
_LCM_LORA_SD15 = _repo(
    """
latent-consistency/lcm-lora-sdv1-5 cf2fced511dbe7e26c8d1d397e728fbab875db4b CreativeML Open RAIL++-M
pytorch_lora_weights.safetensors  134621556 8f90d840e075ff588a58e22c6586e2ae9a6f7922996ee6649a7f01072333afe4 lcm_lora.safetensors
"""
)

_SAFETY = (_SAFETY_CHECKER, _SAFETY_CLASSIFIER)
SOURCES: dict[str, tuple[HubRepo, ...]] = {
    "sdxl": (_SDXL_BASE, _SDXL_VAE, _TAESDXL, _LCM_LORA_SDXL, *_SAFETY),
    "ssd-1b": (_SSD_1B, _SDXL_VAE, _TAESDXL, _LCM_LORA_SSD_1B, *_SAFETY),
    "sd15": (_SD15_BASE, _TAESD, _LCM_LORA_SD15, *_SAFETY),
    "lcm-dreamshaper-v7": (_LCM_DREAMSHAPER, _SD15_FOR_LCM_DREAMSHAPER, _TAESD, *_SAFETY),
}
