--- What goes wrong in a session, in words: with its endpoint, and without a password.
-- @module moonrabbit.session

local errors = require "moonrabbit.errors"

-- Passwords that are remembered, to keep them out of errors.
local MOST_SECRETS = 4

---@class moonrabbit.Session
local Session = {}

--- An error of this session's endpoint.
---@return moonrabbit.Error
function Session:error(kind, message, more)
  local fields = more or {}
  fields.kind, fields.message, fields.endpoint = kind, message, self.endpoint
  return errors.new(fields)
end

local status_errors = {
  blocked = { "blocked", "the broker has blocked publishing: it is short of memory or disk space" },
  window = { "overflow", "the window of unconfirmed publishes is full" },
  overflow = { "overflow", "the output buffer is full (max_buffer)" },
  memory = { "overflow", "out of memory" },
  no_channels = { "overflow", "all channels that the broker allows on a connection are open (channel_max)" },
}

--- The error for a status of the engine; throws for mistakes of the program, at `level` of the caller.
---@return moonrabbit.Error
function Session:refusal(status, what, level)
  if status == "closed" then return self.reason or self:error("closed", "the connection is closed") end
  if status == "too_large" then
    return self:error("overflow",
      what .. ": too large (a body over max_message_size, or headers that don't fit a frame)",
      { code = 311, temporary = false })
  end
  local known = status_errors[status]
  if known then return self:error(known[1], known[2]) end
  error(what .. ": an argument is out of range or nested too deep", (level or 2) + 1)
end

--- An error from what the engine reports, with the endpoint and without the password.
---@return moonrabbit.Error
function Session:report(report)
  local err = errors.from_engine(report, self.endpoint)
  for _, secret in ipairs(self.secrets) do
    local from, to = err.message:find(secret, 1, true)
    while from do
      err.message = err.message:sub(1, from - 1) .. "***" .. err.message:sub(to + 1)
      from, to = err.message:find(secret, from + 3, true)
    end
  end
  return err
end

--- A password that the broker knows, or may come to know: it is not repeated from it. Those before it are
--- remembered for some time.
function Session:keep_secret(secret)
  if not secret or #secret <= 3 then return end
  local secrets = self.secrets
  table.insert(secrets, 1, secret)
  secrets[MOST_SECRETS + 1] = nil
end

return Session
