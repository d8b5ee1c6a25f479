#!/usr/bin/env bash
# Builds the images of the API and the worker from the current commit, with Cloud Build or with local docker (--local), and pushes
# them. Uncommitted changes are not included. If images with the tag exist, they are not built again.
#   scripts/build-and-push.sh [--dry-run] [--local]
# Settings come from the environment and from .env; .env.example explains them.
set -euo pipefail
# shellcheck source=scripts/deploy/cloud.sh
. "$(dirname "${BASH_SOURCE[0]}")/deploy/cloud.sh"
begin "--local" "$@"

# The archive is made from the commit, so that it has no other files of the directory (such as .env), and the same commit gives the
# same images.
pack_source() {
  REVISION=$(git -C "$ROOT" rev-parse HEAD 2>/dev/null) ||
    fail "This directory is not a clone of the repository, and images are built from a commit."
  CREATED=$(git -C "$ROOT" log -1 --format=%cI)
  [ -z "$(git -C "$ROOT" status --porcelain)" ] || note "Uncommitted changes are not in the images."
  git -C "$ROOT" archive --format=tar.gz --output="$SCRATCH/source.tar.gz" HEAD
}

build_in_cloud() {
  local words=(builds submit "$SCRATCH/source.tar.gz" --config="$ROOT/scripts/deploy/cloudbuild.yaml"
    --substitutions="_IMAGES=${IMAGES%/},_TAG=$TAG,_REVISION=$REVISION,_CREATED=$CREATED")
  [ -z "$BUILD_SERVICE_ACCOUNT" ] ||
    words+=(--service-account="projects/$PROJECT_ID/serviceAccounts/$BUILD_SERVICE_ACCOUNT")
  say "Building both images with Cloud Build. This takes some minutes."
  change "${words[@]}"
}

build_locally() {
  local part image
  command -v docker >/dev/null || fail "docker is not installed: leave out --local to use Cloud Build."
  change auth configure-docker "$REGION-docker.pkg.dev"
  for part in api worker; do
    image=$(image_name "$part"):$TAG
    say "Building $image"
    run_with_source docker build --platform=linux/amd64 --file="containers/$part.Dockerfile" --tag="$image" \
      --build-arg=VERSION="$TAG" --build-arg=REVISION="$REVISION" --build-arg=CREATED="$CREATED" -
    run_with_source docker push "$image"
  done
}

run_with_source() {
  if dry_run; then
    would_run "$@"
  else
    "$@" <"$SCRATCH/source.tar.gz" || fail "$1 $2 failed; its output is above."
  fi
}

show_images() {
  local part image
  for part in api worker; do
    find_image image "$part" "$TAG" || fail "The image $part:$TAG does not exist after the build: see the output of the build."
    say "$image"
  done
}

TAG=$(image_tag)
IMAGES=$(image_name "")
look repository artifacts repositories describe "$ARTIFACT_REPOSITORY" --location="$REGION" --format='value(format)' ||
  missing "The repository $ARTIFACT_REPOSITORY" setup-project.sh
if ! dry_run && find_image api_image api "$TAG" && find_image worker_image worker "$TAG"; then
  say "The images exist already."
else
  pack_source
  if option --local; then
    build_locally
  else
    build_in_cloud
  fi
fi
show_images
finish
