{{/* ------------------------------------------------------------- names -- */}}

{{- define "archiver.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 52 characters, so that every suffix of this chart still fits into a name. */}}
{{- define "archiver.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "archiver.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "archiver.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "archiver.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "archiver.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "archiver.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository (default $.Chart.AppVersion .tag) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* These labels must never change during a release's life: the Deployment selects by them. */}}
{{- define "archiver.selectorLabels" -}}
app.kubernetes.io/name: {{ include "archiver.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "archiver.labels" -}}
{{ include "archiver.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* ----------------------------------------------- what the values say -- */}}

{{/* Non-empty if SQLite or a directory is used: one replica, on one volume. */}}
{{- define "archiver.onOneMachine" -}}
{{- if or (hasPrefix "sqlite:" .Values.database.url) (hasPrefix "file:" .Values.store.url) -}}
yes
{{- end -}}
{{- end -}}

{{/* Non-empty if a migration must be run: `archiver run` migrates SQLite itself. */}}
{{- define "archiver.migrates" -}}
{{- if not (hasPrefix "sqlite:" .Values.database.url) -}}
{{- .Values.migrations.mode | replace "none" "" -}}
{{- end -}}
{{- end -}}

{{/* The volume source of the accounts file; empty if all accounts are in the database. */}}
{{- define "archiver.accountsVolume" -}}
{{- if .Values.accountsExistingSecret -}}
secret:
  secretName: {{ .Values.accountsExistingSecret }}
  items:
    - key: {{ .Values.accountsKey }}
      path: accounts.toml
{{- else if .Values.accountsExistingConfigMap -}}
configMap:
  name: {{ .Values.accountsExistingConfigMap }}
  items:
    - key: {{ .Values.accountsKey }}
      path: accounts.toml
{{- else if .Values.accounts -}}
configMap:
  name: {{ include "archiver.fullname" . }}-accounts
{{- end -}}
{{- end -}}

{{/*
The accounts file: every field that an account has, by its own name. The schema
refuses unknown fields, so a new one needs no line here. A JSON string or array
is also a TOML one, so a value cannot end its string early. Whole numbers are
printed as integers, since Helm reads them as floats and would print 1e+06.
*/}}
{{- define "archiver.accountsFile" -}}
{{- range $account := .Values.accounts }}
[[account]]
name = {{ .name | toJson }}
{{- range $key, $value := omit $account "name" }}
{{- if not (kindIs "float64" $value) }}
{{ $key }} = {{ $value | toJson }}
{{- else if eq $value (floor $value) }}
{{ $key }} = {{ $value | int64 }}
{{- else }}
{{ $key }} = {{ $value }}
{{- end }}
{{- end }}
{{ end }}
{{- end -}}

{{/* ------------------------------------------- what every pod is given -- */}}

{{/* Service links would set variables such as ARCHIVER_PORT, which look like settings. */}}
{{- define "archiver.podBasics" -}}
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "archiver.containerBasics" -}}
image: {{ include "archiver.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end -}}

{{/* Spread over nodes and zones if possible, or as the values say. */}}
{{- define "archiver.topologySpread" -}}
{{- $workers := printf "%s\napp.kubernetes.io/component: worker" (include "archiver.selectorLabels" .) | fromYaml -}}
{{- $given := .Values.topologySpreadConstraints -}}
{{- if not $given -}}
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" -}}
{{- $given = append $given (dict "maxSkew" 1 "topologyKey" . "whenUnsatisfiable" "ScheduleAnyway") -}}
{{- end -}}
{{- end -}}
{{- $constraints := list -}}
{{- range $given -}}
{{- $constraints = append $constraints (merge (dict) . (dict "labelSelector" (dict "matchLabels" $workers))) -}}
{{- end -}}
{{- toYaml $constraints -}}
{{- end -}}

{{/* One variable from a Secret: (dict "env" "NAME" "secret" "..." "key" "..." "optional" true) */}}
{{- define "archiver.secretEnv" -}}
- name: {{ .env }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret }}
      key: {{ .key }}
      {{- if .optional }}
      optional: true
      {{- end }}
{{- end -}}

{{/* What `archiver db upgrade` needs, and `archiver run` too. */}}
{{- define "archiver.databaseEnv" -}}
{{- $secret := default .Values.existingSecret .Values.database.existingSecret -}}
{{- if .Values.database.url }}
- name: ARCHIVER_DATABASE_URL
  value: {{ .Values.database.url | quote }}
{{- else }}
{{ include "archiver.secretEnv" (dict "env" "ARCHIVER_DATABASE_URL" "secret" $secret "key" .Values.database.key) }}
{{- end }}
- name: ARCHIVER_LOG_LEVEL
  value: {{ .Values.logLevel | quote }}
{{- range $name, $value := .Values.settings }}
- name: {{ $name }}
  value: {{ $value | toString | quote }}
{{- end }}
{{- end -}}

{{/* What `archiver run` needs beside the database. Of the common Secret, what may be had otherwise is optional. */}}
{{- define "archiver.workerEnv" -}}
{{- $common := .Values.existingSecret -}}
- name: ARCHIVER_STORE_URL
  value: {{ .Values.store.url | quote }}
{{- with .Values.store.endpointUrl }}
- name: ARCHIVER_S3_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.store.region }}
- name: ARCHIVER_S3_REGION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.store }}
{{- $optional := not .existingSecret }}
{{- with default $common .existingSecret }}
{{ include "archiver.secretEnv" (dict "env" "AWS_ACCESS_KEY_ID" "secret" . "key" $.Values.store.accessKeyIdKey "optional" $optional) }}
{{ include "archiver.secretEnv" (dict "env" "AWS_SECRET_ACCESS_KEY" "secret" . "key" $.Values.store.secretAccessKeyKey "optional" $optional) }}
{{- end }}
{{- end }}
{{- with default $common .Values.sealingKey.existingSecret }}
{{ include "archiver.secretEnv" (dict "env" "ARCHIVER_SECRET_KEY" "secret" . "key" $.Values.sealingKey.key) }}
{{- end }}
{{- with default $common .Values.apiToken.existingSecret }}
{{ include "archiver.secretEnv" (dict "env" "ARCHIVER_API_TOKEN" "secret" . "key" $.Values.apiToken.key "optional" (not $.Values.apiToken.existingSecret)) }}
{{- end }}
- name: ARCHIVER_HTTP_LISTEN
  value: {{ printf "%s:%d" (contains ":" .Values.http.address | ternary (printf "[%s]" .Values.http.address) .Values.http.address) (int64 .Values.http.port) | quote }}
- name: ARCHIVER_HTTP_HOSTS
  value: {{ include "archiver.httpHosts" . | quote }}
- name: ARCHIVER_DRAIN_SECONDS
  value: {{ .Values.worker.drainSeconds | int64 | quote }}
{{- with .Values.worker.concurrency }}
- name: ARCHIVER_WORKERS
  value: {{ . | int64 | quote }}
{{- end }}
{{- with .Values.worker.leaseSeconds }}
- name: ARCHIVER_LEASE_SECONDS
  value: {{ . | int64 | quote }}
{{- end }}
- name: ARCHIVER_SPOOL_DIRECTORY
  value: /var/spool/archiver
{{- with .Values.spool.memoryBytes }}
- name: ARCHIVER_SPOOL_MEMORY_BYTES
  value: {{ . | int64 | quote }}
{{- end }}
{{- if include "archiver.accountsVolume" . }}
- name: ARCHIVER_ACCOUNTS_FILE
  value: /etc/archiver/accounts/accounts.toml
{{- end }}
{{- end -}}

{{/* The names under which requests reach the port: the Service's, and those of an ingress. */}}
{{- define "archiver.httpHosts" -}}
{{- $name := include "archiver.fullname" . -}}
{{- $names := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) -}}
{{- concat $names .Values.http.hosts | join "," -}}
{{- end -}}
