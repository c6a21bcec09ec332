--- De-duplication: stores that remember which messages have been handled.
--
--     local dedupe = require("moonrabbit").dedupe
--     dedupe = dedupe.memory { ttl = 3600 }          -- of a consumer in an app
--
-- | store | remembers | for |
-- | --- | --- | --- |
-- | `memory` | in this process | one process; nothing after a restart |
-- | `redis` | in Redis, `SET NX PX` | many processes and machines |
-- | `sql` | in a table with a unique index (SQLite, PostgreSQL) | what must not be forgotten; can join your own transaction |
-- | `state` | the state of your own objects | a business state machine: which transitions are allowed |
-- | `shared` | in a dictionary of nginx | the workers of one nginx |
--
-- A store of your own is a table with three functions, which may wait in the way of the runtime:
--
-- * `begin(self, key, lease)`: "new", the key is the caller's to handle; "running", somebody else has it; "done", it was
--   handled; "refused", err: it must never be handled; nil, err: the store is away.
-- * `commit(self, key)`, `abort(self, key)`: true, or nil, err.
--
-- and, where it needs one, `attach(self, runtime)`, which the app calls before the first `begin`. `quick = true` says that
-- they never wait and never throw, which saves a pcall; they are then given the runtime's time too: `begin(self, key, lease,
-- now)`, `commit(self, key, now)`.
-- @module moonrabbit.app.dedupe

local dedupe = {}

for _, name in ipairs { "memory", "redis", "sql", "state", "shared" } do
  dedupe[name] = function(opts)
    local store = require("moonrabbit.app.dedupe." .. name).new(opts, 2)
    return store
  end
end

return dedupe
