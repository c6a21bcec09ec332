--- The names of the headers that copies of a message carry, and reading them.
--
-- | header | |
-- | --- | --- |
-- | `moonrabbit-attempts` | how many attempts have failed |
-- | `moonrabbit-first-failure`, `moonrabbit-last-failure` | when (timestamps) |
-- | `moonrabbit-error`, `moonrabbit-error-kind` | of the last failure |
-- | `moonrabbit-exchange`, `moonrabbit-key` | where the message was published to |
-- | `moonrabbit-queue` | the queue whose consumer failed |
-- | `moonrabbit-reason`, `moonrabbit-traceback`, `moonrabbit-dead-at`, `moonrabbit-app` | of dead letters |
-- | `moonrabbit-replays` | how often it was replayed |
-- | `moonrabbit-deaths` | what the broker had noted in `x-death`, `x-first-death-*` and `x-last-death-*` |
-- | `moonrabbit-expiration`, `moonrabbit-user-id`, `moonrabbit-reply-to`, `moonrabbit-cc`, `moonrabbit-bcc` | properties and headers that a copy must not have |
--
-- Anybody can publish a message with such headers: what is read here is checked.
-- @module moonrabbit.app.headers

local headers = {
  attempts = "moonrabbit-attempts",
  first_failure = "moonrabbit-first-failure",
  last_failure = "moonrabbit-last-failure",
  error = "moonrabbit-error",
  error_kind = "moonrabbit-error-kind",
  exchange = "moonrabbit-exchange",
  routing_key = "moonrabbit-key",
  queue = "moonrabbit-queue",
  reason = "moonrabbit-reason",
  traceback = "moonrabbit-traceback",
  dead_at = "moonrabbit-dead-at",
  app = "moonrabbit-app",
  replays = "moonrabbit-replays",
  deaths = "moonrabbit-deaths",
  expiration = "moonrabbit-expiration",
  user_id = "moonrabbit-user-id",
  reply_to = "moonrabbit-reply-to",
  cc = "moonrabbit-cc",
  bcc = "moonrabbit-bcc",
}

-- More attempts than any policy allows: nobody counted that far.
local MOST = 1000000000

--- A header as a whole number from 0, or nil.
---@param all table<string, any> the headers of a message
---@param name string one of the names above: headers.attempts
---@return integer?
function headers.count(all, name)
  local value = all[name]
  if type(value) ~= "number" or value ~= math.floor(value) or value < 0 or value > MOST then return nil end
  return value
end

--- A header as a string of at most `longest` bytes, or nil.
---@param all table<string, any>
---@param name string
---@param longest integer? no bound by default
---@return string?
function headers.text(all, name, longest)
  local value = all[name]
  if type(value) ~= "string" or longest and #value > longest then return nil end
  return value
end

--- A header as seconds since 1970, or nil.
---@param all table<string, any>
---@param name string
---@return number?
function headers.time(all, name)
  local value = all[name]
  if type(value) == "number" and value >= 0 and value < 1e12 then return value end
end

return headers
