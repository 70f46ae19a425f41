{{/*
Rules that values.schema.json cannot express: which values need each other, and
which combinations would lose mail. Values that may contain a secret by mistake
are also checked here, because an error of the schema would print them. All
mistakes are reported at once, one per line.
*/}}
{{- define "archiver.validate" -}}
{{- $wrong := list -}}
{{- $database := .Values.database -}}
{{- $storeUrl := .Values.store.url -}}
{{- $mountPath := .Values.persistence.mountPath -}}

{{- if not .Values.image.repository -}}
{{- $wrong = append $wrong "image.repository is not set: set it to the image that you built from the Dockerfile" -}}
{{- end -}}

{{- if and $database.url $database.existingSecret -}}
{{- $wrong = append $wrong "database.url and database.existingSecret are both set: choose one" -}}
{{- else if not (or $database.url $database.existingSecret .Values.existingSecret) -}}
{{- $wrong = append $wrong "no database: set existingSecret or database.existingSecret to a Secret with its URL" -}}
{{- end -}}
{{- if not (regexMatch "^(postgresql://.+|sqlite:///.+)?$" $database.url) -}}
{{- $wrong = append $wrong "database.url is invalid: use postgresql://user@host/name or sqlite:///path" -}}
{{- end -}}
{{- if or (regexMatch "^[^:]+://[^@]*:[^@]*@" $database.url) (regexMatch "(?i)[?&]password=" $database.url) -}}
{{- $wrong = append $wrong "database.url contains a password: put the URL into a Secret, and set database.existingSecret to its name" -}}
{{- end -}}

{{- if not $storeUrl -}}
{{- $wrong = append $wrong "store.url is not set: messages are stored there, for example s3://bucket/prefix" -}}
{{- end -}}

{{- if include "archiver.onOneMachine" . -}}
{{- if gt (int64 .Values.replicaCount) 1 -}}
{{- if hasPrefix "sqlite:" $database.url -}}
{{- $wrong = append $wrong (printf "database.url is SQLite, which replicas cannot share: set replicaCount to 1 (it is %d), or use PostgreSQL" (int64 .Values.replicaCount)) -}}
{{- end -}}
{{- if hasPrefix "file:" $storeUrl -}}
{{- $wrong = append $wrong (printf "store.url is a directory, which replicas cannot share: set replicaCount to 1 (it is %d), or use s3://" (int64 .Values.replicaCount)) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.persistence.existingClaim -}}
{{- $wrong = append $wrong "persistence.existingClaim is not set: SQLite, or a directory as the store, would be lost with the pod" -}}
{{- end -}}
{{- if and (hasPrefix "sqlite:" $database.url) (not (hasPrefix (printf "sqlite:///%s/" $mountPath) $database.url)) -}}
{{- $wrong = append $wrong (printf "database.url is outside the volume: it must begin with sqlite:///%s/" $mountPath) -}}
{{- end -}}
{{- if and (hasPrefix "file:" $storeUrl) (not (hasPrefix (printf "file:%s/" $mountPath) $storeUrl)) -}}
{{- $wrong = append $wrong (printf "store.url is outside the volume: it must begin with file:%s/" $mountPath) -}}
{{- end -}}
{{- end -}}

{{- $sources := 0 -}}
{{- range list .Values.accounts .Values.accountsExistingConfigMap .Values.accountsExistingSecret -}}
{{- if . -}}{{- $sources = add1 $sources -}}{{- end -}}
{{- end -}}
{{- if gt (int $sources) 1 -}}
{{- $wrong = append $wrong "accounts, accountsExistingConfigMap and accountsExistingSecret exclude each other: set only one" -}}
{{- end -}}
{{- $names := dict -}}
{{- range $account := .Values.accounts -}}
{{- if hasKey $names .name -}}
{{- $wrong = append $wrong (printf "accounts: %q occurs twice" .name) -}}
{{- end -}}
{{- $_ := set $names .name true -}}
{{- if not (regexMatch "^(?i:(pop3s?|pops?)://[^/@:\\s]+@[^/@\\s]+/?|pop2://[^/@:\\s]+@[^/@\\s]+(/[^/@:\\s]*)?)$" .url) -}}
{{- $wrong = append $wrong (printf "accounts: the url of %q is not like pop3s://user@host; leave out the password, and write an @ in the user name as %%40" .name) -}}
{{- end -}}
{{- if not (regexMatch "^(oauth:)?(file:/\\S.*|env:[A-Za-z_][A-Za-z0-9_]*)$" .password) -}}
{{- $wrong = append $wrong (printf "accounts: the password of %q is not a reference: use file:/path or env:NAME, with oauth: in front for an OAuth credential" .name) -}}
{{- end -}}
{{- if and (regexMatch "^(oauth:)?file:/etc/archiver/passwords/" .password) (not $.Values.mailboxSecret) -}}
{{- $wrong = append $wrong (printf "accounts: the password of %q is a file under /etc/archiver/passwords, but mailboxSecret is not set" .name) -}}
{{- end -}}
{{- range $key := list "client_certificate" "client_key" -}}
{{- if and (hasPrefix "/etc/archiver/passwords/" (default "" (get $account $key))) (not $.Values.mailboxSecret) -}}
{{- $wrong = append $wrong (printf "accounts: the %s of %q is a file under /etc/archiver/passwords, but mailboxSecret is not set" $key $account.name) -}}
{{- end -}}
{{- end -}}
{{- if and (hasPrefix "/etc/archiver/ca/" (default "" .ca_file)) (not $.Values.caBundle.existingConfigMap) -}}
{{- $wrong = append $wrong (printf "accounts: the ca_file of %q is a file under /etc/archiver/ca, but caBundle.existingConfigMap is not set" .name) -}}
{{- end -}}
{{- end -}}

{{- $owners := dict
  "ARCHIVER_DATABASE_URL" "database"
  "ARCHIVER_STORE_URL" "store.url"
  "ARCHIVER_S3_ENDPOINT_URL" "store.endpointUrl"
  "ARCHIVER_S3_REGION" "store.region"
  "ARCHIVER_SECRET_KEY" "sealingKey"
  "ARCHIVER_API_TOKEN" "apiToken"
  "ARCHIVER_HTTP_LISTEN" "http"
  "ARCHIVER_HTTP_HOSTS" "http.hosts"
  "ARCHIVER_DRAIN_SECONDS" "worker.drainSeconds"
  "ARCHIVER_WORKERS" "worker.concurrency"
  "ARCHIVER_LEASE_SECONDS" "worker.leaseSeconds"
  "ARCHIVER_SPOOL_DIRECTORY" "spool"
  "ARCHIVER_SPOOL_MEMORY_BYTES" "spool.memoryBytes"
  "ARCHIVER_ACCOUNTS_FILE" "accounts"
  "ARCHIVER_LOG_LEVEL" "logLevel" -}}
{{- range $name := keys .Values.settings | sortAlpha -}}
{{- with get $owners $name -}}
{{- $wrong = append $wrong (printf "settings: %s has its own value in the chart: use %s" $name .) -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- with get $owners .name -}}
{{- $wrong = append $wrong (printf "extraEnv: a value of the chart sets this variable: use %s" .) -}}
{{- end -}}
{{- end -}}

{{- if $wrong -}}
{{- fail (printf "\n  %s\n" (join "\n  " $wrong)) -}}
{{- end -}}
{{- end -}}
