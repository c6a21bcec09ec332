--- One attempt at one broker, and a round of them over all targets.
-- @module moonrabbit.connection.dial

local described = require "moonrabbit.described"
local errors = require "moonrabbit.errors"
local protect = require "moonrabbit.protect"
local uri = require "moonrabbit.uri"
local Session = require "moonrabbit.session"

local dial = {}

local function client_properties(opts)
  if not opts.name then return opts.client_properties end
  local all = {}
  for key, value in pairs(opts.client_properties or {}) do all[key] = value end
  all.connection_name = opts.name
  return all
end

-- The password of today: a function's answer, else what update_secret told the broker last, else the option's.
local function password_of(self, to, label)
  local password = to.password
  if type(password) ~= "function" then return self._secrets[to.user] or password end
  local whole, answer, problem = protect(password)
  if whole and type(answer) == "string" then return answer end
  if not whole then
    if answer == self._runtime.cancelled then error(answer, 0) end
    problem = described(answer)
  end
  return nil, errors.new { kind = "auth", endpoint = label, temporary = true,
    message = "the password function gave none" .. (problem and ": " .. tostring(problem) or "") }
end

--- A session with one target; nil, err.
function dial.one(self, to)
  local opts = self._opts
  local label = uri.endpoint(to)
  local password, problem = password_of(self, to, label)
  if not password then return nil, problem end
  local external = to.mechanism == "EXTERNAL"
  local link = {} -- what is heard before the session is known is of nobody's interest
  local session, err = Session.open {
    runtime = self._runtime,
    endpoint = { host = to.host, port = to.port, path = to.path },
    label = label,
    tls = to.tls,
    timeout = to.connect_timeout,
    -- Whatever a broker says, the password is not repeated from it.
    secret = not external and password ~= to.user and password or nil,
    log = self._log,
    health = self._health,
    emit = function(event, ...) if link.session then self:_heard(link.session, event, ...) end end,
    overfull = function() return self:_overfull() end,
    survives = function(session, why) return self:_survives(session, why) end,
    engine = {
      vhost = to.vhost, user = not external and to.user or nil, password = not external and password or nil,
      mechanism = to.mechanism, heartbeat = to.heartbeat, frame_max = to.frame_max, channel_max = to.channel_max,
      max_message_size = opts.max_message_size, max_buffer = opts.max_buffer, ack_delay = opts.ack_delay,
      client_properties = client_properties(opts),
    },
  }
  link.session = session
  return session, err
end

-- Whether trying again cannot help. Where a connection stood before, a name that has gone (a container is being
-- replaced) or a peer that talks nonsense (a balancer without a node behind it) may pass.
local final_kinds = { auth = true, vhost = true, tls = true }

local function is_final(self, err)
  if err.temporary ~= false then return false end
  return not self._opened_at or final_kinds[err.kind] or false
end

--- Tries the targets of a round, one after the other. Answers a session and its target; or nil, the last
--- error, and whether trying again cannot help. `go_on`: asked before each.
---@param go_on (fun(): boolean)?
function dial.round(self, go_on)
  local source = self._source
  local targets, err = source:round()
  if not targets then return nil, err, is_final(self, err) end
  local permanent = true
  for _, to in ipairs(targets) do
    if go_on and not go_on() then return nil, err, false end
    local session
    session, err = dial.one(self, to)
    if session then
      source:connected(to, session)
      return session, to
    end
    source:failed(to, err)
    permanent = permanent and is_final(self, err)
  end
  return nil, err or errors.new { kind = "refused", message = "there is no endpoint to connect to" },
    #targets > 0 and permanent
end

return dial
