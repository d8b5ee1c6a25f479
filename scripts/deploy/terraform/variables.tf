# Names, meanings and defaults are those of .env.example.

variable "project_id" {
  description = "The project."
  type        = string

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "project_id must be the ID of a project: 6 to 30 lowercase letters, digits and hyphens, a letter first."
  }
}

variable "region" {
  description = "The region of the service, the jobs, the bucket and the images."
  type        = string
  default     = "us-central1"
}

variable "gcs_logs_bucket" {
  description = "The bucket of tasks and logs; by default {project_id}-claude-logs."
  type        = string
  default     = null
}

variable "log_retention_days" {
  description = "After so many days tasks and logs are deleted."
  type        = number
  default     = 30

  validation {
    condition     = var.log_retention_days >= 1
    error_message = "log_retention_days must be 1 or more."
  }
}

variable "kms_location" {
  description = "Where the key is kept. A key ring cannot be moved."
  type        = string
  default     = "global"
}

variable "kms_key_ring" {
  description = "The key ring. It cannot be deleted."
  type        = string
  default     = "claude-code"
}

variable "kms_key_name" {
  description = "The key that seals requests."
  type        = string
  default     = "payload-encryption"
}

variable "cloudrun_service_name" {
  description = "The service that runs ccrun serve."
  type        = string
  default     = "claude-code-service"
}

variable "cloudrun_job_name" {
  description = "The job that runs ccrun worker."
  type        = string
  default     = "claude-code-job"
}

variable "cloudrun_sweep_name" {
  description = "The job that runs ccrun sweep."
  type        = string
  default     = "claude-code-sweep"
}

variable "artifact_repository" {
  description = "The repository of images in Artifact Registry."
  type        = string
  default     = "claude-code"
}

variable "image_tag" {
  description = "The tag of the images, as ../../build-and-push.sh prints it."
  type        = string
}

variable "job_memory" {
  description = "Memory of one task. It holds the agent's files as well."
  type        = string
  default     = "2Gi"
}

variable "job_cpu" {
  description = "CPUs of one task."
  type        = string
  default     = "2"
}

variable "service_memory" {
  description = "Memory of one instance of the service."
  type        = string
  default     = "1Gi"
}

variable "service_cpu" {
  description = "CPUs of one instance of the service."
  type        = string
  default     = "1"
}

variable "service_concurrency" {
  description = "Requests that one instance takes at once; each stream is one."
  type        = number
  default     = 100
}

variable "service_min_instances" {
  description = "Instances that are always there."
  type        = number
  default     = 0
}

variable "service_max_instances" {
  description = "Instances at the most."
  type        = number
  default     = 10
}

variable "service_cpu_always" {
  description = "Whether an instance has its CPU between requests too."
  type        = bool
  default     = false
}

variable "service_ingress" {
  description = "From where the service can be reached."
  type        = string
  default     = "INGRESS_TRAFFIC_ALL"

  validation {
    condition     = contains(["INGRESS_TRAFFIC_ALL", "INGRESS_TRAFFIC_INTERNAL_ONLY", "INGRESS_TRAFFIC_INTERNAL_LOAD_BALANCER"], var.service_ingress)
    error_message = "service_ingress must be INGRESS_TRAFFIC_ALL, INGRESS_TRAFFIC_INTERNAL_ONLY or INGRESS_TRAFFIC_INTERNAL_LOAD_BALANCER."
  }
}

variable "callers" {
  description = "Who may call the service: user:…, group:…, serviceAccount:…, domain:…."
  type        = set(string)
  default     = []

  validation {
    condition     = !anytrue([for caller in var.callers : contains(["allUsers", "allAuthenticatedUsers"], caller)])
    error_message = "callers may not be everybody: whoever calls the service runs agents at your cost."
  }
}

variable "max_timeout_minutes" {
  description = "The longest timeoutMinutes that a request may ask for. The job's own timeout is 15 minutes more."
  type        = number
  default     = 60

  validation {
    condition     = var.max_timeout_minutes >= 1 && var.max_timeout_minutes <= 1440
    error_message = "max_timeout_minutes must be from 1 to 1440."
  }
}

variable "sweep_schedule" {
  description = "How often the sweep runs: a schedule of cron, in UTC."
  type        = string
  default     = "*/5 * * * *"
}

variable "scheduler_location" {
  description = "Where the schedule is kept, for regions that Cloud Scheduler does not have; by default the region."
  type        = string
  default     = null
}

variable "worker_secrets" {
  description = "The secrets that the worker gets: CLOUDRUN_CALLBACK_SECRET, and your own model credential if requests may come without."
  type        = set(string)
  default     = ["CLOUDRUN_CALLBACK_SECRET"]

  validation {
    condition = contains(var.worker_secrets, "CLOUDRUN_CALLBACK_SECRET") && length(setsubtract(var.worker_secrets, [
      "CLOUDRUN_CALLBACK_SECRET", "ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_CUSTOM_HEADERS",
    ])) == 0
    error_message = "worker_secrets must have CLOUDRUN_CALLBACK_SECRET, and may have ANTHROPIC_API_KEY, CLAUDE_CODE_OAUTH_TOKEN, ANTHROPIC_AUTH_TOKEN and ANTHROPIC_CUSTOM_HEADERS."
  }
}

variable "service_settings" {
  description = "More settings of the service: MAX_REQUEST_BYTES, ALLOWED_TOOLS, PERMISSION_MODE, ALLOWED_BASE_URLS, AGENT_NETWORK, HEARTBEAT_SECONDS, POLL_SECONDS, LOG_LEVEL."
  type        = map(string)
  default     = {}
}

variable "worker_settings" {
  description = "More settings of the worker: MAX_LINE_BYTES, MAX_UPLOAD_BYTES, TASK_MEMORY, TASK_PIDS, TASK_DISK, CCRUN_SANDBOX, AGENT_NETWORK, AGENT_ALLOWED_HOSTS, AGENT_PRIVATE_HOSTS, CALLBACK_ALLOWED_HOSTS, CALLBACK_TIMEOUT_SECONDS, GOOGLE_OIDC_AUDIENCE, ANTHROPIC_BASE_URL, ANTHROPIC_MODEL, ANTHROPIC_DEFAULT_OPUS_MODEL, ANTHROPIC_DEFAULT_SONNET_MODEL, ANTHROPIC_DEFAULT_HAIKU_MODEL, FLUSH_LINES, FLUSH_SECONDS, LOG_LEVEL."
  type        = map(string)
  default     = {}
}

variable "sweep_settings" {
  description = "More settings of the sweep: CALLBACK_ALLOWED_HOSTS, CALLBACK_TIMEOUT_SECONDS, GOOGLE_OIDC_AUDIENCE, LOG_LEVEL."
  type        = map(string)
  default     = {}
}
