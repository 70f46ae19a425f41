-- How accounts are claimed, on SQLite. Each statement is whole: it can be read, and EXPLAINed, as it is.
-- Parameters: :named (JSON object of host to sessions), :others, :limit, :failing_limit, :looked_at,
-- :most_of_all, :owner, :lease_seconds. claims.py says what each is; the other database has a file beside this.

-- name: claim_due
-- Claim up to :limit accounts that are due and whose host has room, the longest overdue first, and of those
-- whose last poll failed no more than :failing_limit.
WITH RECURSIVE
-- Hosts whose number of sessions is set one by one. All others may have :others.
named(host, most) AS (
    SELECT key, value FROM json_each(:named)
),
-- The sessions of this moment. Those whose lease has expired are to be taken over.
sessions AS MATERIALIZED (
    SELECT lease.account_id, lease.host, lease.slot, lease.due_at, lease.failures,
        lease.expires_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now') AS expired,
        coalesce(named.most, :others) AS most
    FROM lease LEFT JOIN named ON named.host = lease.host
    WHERE lease.slot IS NOT NULL
),
-- The hosts that have sessions or are backing off, and the room that is left: for a new session,
-- and for one that takes over an expired one. A host that is tried again has room for one.
limited AS MATERIALIZED (
    SELECT host, min(most) - sum(alive) - sum(expired) AS room, min(most) - sum(alive) AS room_for_expired
    FROM (
        SELECT host, most, CASE WHEN expired THEN 0 ELSE 1 END AS alive,
            CASE WHEN expired THEN 1 ELSE 0 END AS expired
        FROM sessions
        UNION ALL
        SELECT name, CASE WHEN retry_at > strftime('%Y-%m-%d %H:%M:%f000', 'now') THEN 0 ELSE 1 END, 0, 0
        FROM host WHERE retry_at IS NOT NULL
    ) AS counted
    GROUP BY host
),
-- Accounts that are due and not queued, the first of each queue, and expired sessions. Accounts whose
-- last poll failed have indexes of their own, so that many of them hide none of the others.
candidates AS (
    SELECT * FROM (
        SELECT account_id, host, due_at, slot, failures > 0 AS failing FROM lease
        WHERE slot IS NULL AND NOT queued AND failures = 0 AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
            AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ORDER BY due_at LIMIT :looked_at
    ) AS due_well
    UNION ALL SELECT * FROM (
        SELECT account_id, host, due_at, slot, failures > 0 AS failing FROM lease
        WHERE slot IS NULL AND NOT queued AND failures > 0 AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
            AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ORDER BY due_at LIMIT :failing_limit
    ) AS due_failing
    UNION ALL SELECT * FROM (
        SELECT account_id, host, due_at, slot, failing FROM (
            SELECT account_id, host, due_at, slot, failures > 0 AS failing,
                row_number() OVER (PARTITION BY host ORDER BY due_at) AS rank
            FROM lease
            WHERE queued AND failures = 0 AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ) AS ranked WHERE rank <= :looked_at
    ) AS heads_well
    UNION ALL SELECT * FROM (
        SELECT account_id, host, due_at, slot, failing FROM (
            SELECT account_id, host, due_at, slot, failures > 0 AS failing,
                row_number() OVER (PARTITION BY host ORDER BY due_at) AS rank
            FROM lease
            WHERE queued AND failures > 0 AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ) AS ranked WHERE rank <= :failing_limit
    ) AS heads_failing
    UNION ALL SELECT account_id, host, due_at, slot, failures > 0 FROM sessions
        WHERE expired AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
),
-- As many of each host as it has room for, the longest overdue first.
ranked AS (
    SELECT candidates.*, row_number() OVER (
        PARTITION BY host, slot IS NULL ORDER BY due_at, account_id
    ) AS rank
    FROM candidates
),
fitting AS (
    SELECT ranked.*, row_number() OVER (PARTITION BY failing ORDER BY due_at, account_id) AS turn
    FROM ranked
    LEFT JOIN limited ON limited.host = ranked.host
    LEFT JOIN named ON named.host = ranked.host
    WHERE rank <= coalesce(
        CASE WHEN slot IS NULL THEN room ELSE room_for_expired END, named.most, :others
    )
),
chosen AS (
    SELECT account_id, host, slot, rank FROM fitting
    WHERE NOT failing OR turn <= :failing_limit
    ORDER BY due_at, account_id LIMIT :limit
),
-- Each new session gets the lowest slot of its host that is free.
number(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < :most_of_all),
free AS (
    SELECT host, n, row_number() OVER (PARTITION BY host ORDER BY n) AS rank
    FROM (
        SELECT host, max(rank) + (SELECT count(*) FROM sessions WHERE sessions.host = chosen.host) AS last
        FROM chosen WHERE slot IS NULL GROUP BY host
    ) AS wanted JOIN number ON n <= last
    WHERE NOT EXISTS (SELECT 1 FROM sessions WHERE sessions.host = wanted.host AND sessions.slot = n)
),
seated AS (
    SELECT chosen.account_id, coalesce(chosen.slot, free.n) AS slot
    FROM chosen
    JOIN lease ON lease.account_id = chosen.account_id
    LEFT JOIN free ON free.host = chosen.host AND free.rank = chosen.rank
    WHERE lease.due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now') AND coalesce(chosen.slot, free.n) IS NOT NULL
)
-- A holder that did not release its lease may have left a journal segment that the database has not seen.
UPDATE lease SET
    token = token + 1,
    owner = :owner,
    expires_at = strftime('%Y-%m-%d %H:%M:%f000', 'now', :lease_seconds || ' seconds'),
    due_at = strftime('%Y-%m-%d %H:%M:%f000', 'now', :lease_seconds || ' seconds'),
    recover = recover OR owner IS NOT NULL,
    slot = seated.slot,
    queued = false,
    asked = false
FROM seated WHERE lease.account_id = seated.account_id
RETURNING lease.account_id, lease.token, lease.recover, lease.host, lease.failures;

-- name: count_due
-- How many accounts claim_due would get.
WITH RECURSIVE
-- Hosts whose number of sessions is set one by one. All others may have :others.
named(host, most) AS (
    SELECT key, value FROM json_each(:named)
),
-- The sessions of this moment. Those whose lease has expired are to be taken over.
sessions AS MATERIALIZED (
    SELECT lease.account_id, lease.host, lease.slot, lease.due_at, lease.failures,
        lease.expires_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now') AS expired,
        coalesce(named.most, :others) AS most
    FROM lease LEFT JOIN named ON named.host = lease.host
    WHERE lease.slot IS NOT NULL
),
-- The hosts that have sessions or are backing off, and the room that is left: for a new session,
-- and for one that takes over an expired one. A host that is tried again has room for one.
limited AS MATERIALIZED (
    SELECT host, min(most) - sum(alive) - sum(expired) AS room, min(most) - sum(alive) AS room_for_expired
    FROM (
        SELECT host, most, CASE WHEN expired THEN 0 ELSE 1 END AS alive,
            CASE WHEN expired THEN 1 ELSE 0 END AS expired
        FROM sessions
        UNION ALL
        SELECT name, CASE WHEN retry_at > strftime('%Y-%m-%d %H:%M:%f000', 'now') THEN 0 ELSE 1 END, 0, 0
        FROM host WHERE retry_at IS NOT NULL
    ) AS counted
    GROUP BY host
),
-- Accounts that are due and not queued, the first of each queue, and expired sessions. Accounts whose
-- last poll failed have indexes of their own, so that many of them hide none of the others.
candidates AS (
    SELECT * FROM (
        SELECT account_id, host, due_at, slot, failures > 0 AS failing FROM lease
        WHERE slot IS NULL AND NOT queued AND failures = 0 AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
            AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ORDER BY due_at LIMIT :looked_at
    ) AS due_well
    UNION ALL SELECT * FROM (
        SELECT account_id, host, due_at, slot, failures > 0 AS failing FROM lease
        WHERE slot IS NULL AND NOT queued AND failures > 0 AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
            AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ORDER BY due_at LIMIT :failing_limit
    ) AS due_failing
    UNION ALL SELECT * FROM (
        SELECT account_id, host, due_at, slot, failing FROM (
            SELECT account_id, host, due_at, slot, failures > 0 AS failing,
                row_number() OVER (PARTITION BY host ORDER BY due_at) AS rank
            FROM lease
            WHERE queued AND failures = 0 AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ) AS ranked WHERE rank <= :looked_at
    ) AS heads_well
    UNION ALL SELECT * FROM (
        SELECT account_id, host, due_at, slot, failing FROM (
            SELECT account_id, host, due_at, slot, failures > 0 AS failing,
                row_number() OVER (PARTITION BY host ORDER BY due_at) AS rank
            FROM lease
            WHERE queued AND failures > 0 AND host NOT IN (SELECT host FROM limited WHERE room <= 0)
        ) AS ranked WHERE rank <= :failing_limit
    ) AS heads_failing
    UNION ALL SELECT account_id, host, due_at, slot, failures > 0 FROM sessions
        WHERE expired AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
),
-- As many of each host as it has room for, the longest overdue first.
ranked AS (
    SELECT candidates.*, row_number() OVER (
        PARTITION BY host, slot IS NULL ORDER BY due_at, account_id
    ) AS rank
    FROM candidates
),
fitting AS (
    SELECT ranked.*, row_number() OVER (PARTITION BY failing ORDER BY due_at, account_id) AS turn
    FROM ranked
    LEFT JOIN limited ON limited.host = ranked.host
    LEFT JOIN named ON named.host = ranked.host
    WHERE rank <= coalesce(
        CASE WHEN slot IS NULL THEN room ELSE room_for_expired END, named.most, :others
    )
),
chosen AS (
    SELECT account_id, host, slot, rank FROM fitting
    WHERE NOT failing OR turn <= :failing_limit
    ORDER BY due_at, account_id LIMIT :limit
)
SELECT count(*) FROM chosen;

-- name: queue_at_hosts
-- Queue the accounts that are due and for which their host has no room, so that claims need not pass over them.
WITH RECURSIVE
-- Hosts whose number of sessions is set one by one. All others may have :others.
named(host, most) AS (
    SELECT key, value FROM json_each(:named)
),
-- The sessions of this moment. Those whose lease has expired are to be taken over.
sessions AS MATERIALIZED (
    SELECT lease.account_id, lease.host, lease.slot, lease.due_at, lease.failures,
        lease.expires_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now') AS expired,
        coalesce(named.most, :others) AS most
    FROM lease LEFT JOIN named ON named.host = lease.host
    WHERE lease.slot IS NOT NULL
),
-- The hosts that have sessions or are backing off, and the room that is left: for a new session,
-- and for one that takes over an expired one. A host that is tried again has room for one.
limited AS MATERIALIZED (
    SELECT host, min(most) - sum(alive) - sum(expired) AS room, min(most) - sum(alive) AS room_for_expired
    FROM (
        SELECT host, most, CASE WHEN expired THEN 0 ELSE 1 END AS alive,
            CASE WHEN expired THEN 1 ELSE 0 END AS expired
        FROM sessions
        UNION ALL
        SELECT name, CASE WHEN retry_at > strftime('%Y-%m-%d %H:%M:%f000', 'now') THEN 0 ELSE 1 END, 0, 0
        FROM host WHERE retry_at IS NOT NULL
    ) AS counted
    GROUP BY host
),
-- Accounts that are due and not queued, the longest overdue of each host first.
due AS (
    SELECT account_id, host, row_number() OVER (PARTITION BY host ORDER BY due_at, account_id) AS rank
    FROM (
        SELECT * FROM (
            SELECT account_id, host, due_at FROM lease
            WHERE slot IS NULL AND NOT queued AND failures = 0 AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
            ORDER BY due_at LIMIT :looked_at
        ) AS due_well
        UNION ALL SELECT * FROM (
            SELECT account_id, host, due_at FROM lease
            WHERE slot IS NULL AND NOT queued AND failures > 0 AND due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
            ORDER BY due_at LIMIT :looked_at
        ) AS due_failing
    ) AS longest_overdue
),
beyond AS (
    SELECT lease.account_id FROM due
    JOIN lease ON lease.account_id = due.account_id
    LEFT JOIN limited ON limited.host = due.host
    LEFT JOIN named ON named.host = due.host
    WHERE rank > coalesce(room, named.most, :others)
        AND lease.slot IS NULL AND NOT lease.queued AND lease.due_at <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
)
UPDATE lease SET queued = true FROM beyond WHERE lease.account_id = beyond.account_id
RETURNING lease.account_id;
