--- Connecting cosockets. nginx looks names up itself, asks no hosts file, and tells none of a name's addresses: it
--- takes one of them by chance. Nothing of that can be interrupted; so a light thread does it, which can be killed.

local describe = require "moonrabbit.runtime.shared.describe"
local ms = require("moonrabbit.runtime.resty.limits").ms
local tls_of = require "moonrabbit.runtime.resty.tls"
local transport = require "moonrabbit.runtime.resty.transport"

-- A name that may have several addresses is tried so often.
local ATTEMPTS = 4

local thread_spawn, thread_kill = ngx.thread.spawn, ngx.thread.kill

local function kind_of(err)
  if err == "timeout" then return "timeout", true, "no answer in time" end
  if err:find("no resolver defined", 1, true) then
    return "dns", false, err .. ": nginx looks names up by its own directive `resolver` alone (or give an address)"
  end
  -- nginx's words, those of Kong ("DNS resolution failed") and those of APISIX.
  if err:find("resol", 1, true) or err:find("parse domain", 1, true) then return "dns", true, err end
  if err:find("refused", 1, true) or err:lower():find("no such file", 1, true) then return "refused", true, err end
  return "closed", true, err
end

local function is_address(host) return host:find ":" or host:find "^%d+%.%d+%.%d+%.%d+$" end

-- What to connect to, in turn.
local function addresses(endpoint)
  if endpoint.path then return { "unix:" .. endpoint.path } end
  local host = endpoint.host
  if host == "localhost" then return { "127.0.0.1", "[::1]" } end
  if host:find(":", 1, true) then return { "[" .. host .. "]" } end
  local list = {}
  for i = 1, is_address(host) and 1 or ATTEMPTS do list[i] = host end
  return list
end

local function connect(endpoint, deadline, now)
  local list = addresses(endpoint)
  local kind, temporary, text
  for i, address in ipairs(list) do
    local left = deadline - now()
    if left <= 0 then
      if not kind then kind, temporary, text = kind_of "timeout" end
      break
    end
    local socket = ngx.socket.tcp()
    socket:settimeout(ms(left / (#list - i + 1)))
    local ok, err
    if endpoint.path then ok, err = socket:connect(address) else ok, err = socket:connect(address, endpoint.port) end
    if ok then return socket end
    local why, again, said = kind_of(tostring(err))
    -- Of two failures the one that came farther says what is wrong.
    if not kind or kind == "refused" then kind, temporary, text = why, again, said end
    if why == "dns" then break end
  end
  return nil, kind, ("cannot connect to %s: %s"):format(describe(endpoint), text), temporary
end

-- A connected cosocket, secure if it is to be.
local function establish(endpoint, tls, deadline, now)
  local identity, problem
  if tls then
    identity, problem = tls_of.prepare(tls)
    if identity == nil then return nil, "tls", problem, false end
  end
  local socket, kind, text, temporary = connect(endpoint, deadline, now)
  if not socket or not tls then return socket, kind, text, temporary end
  socket:settimeout(ms(deadline - now()))
  local ok
  ok, kind, text, temporary = tls_of.secure(socket, tls, identity)
  if ok then return socket end
  socket:close()
  return nil, kind, text, temporary
end

-- The body of that light thread.
local function live(job, runtime, endpoint, tls, deadline)
  local found = { pcall(establish, endpoint, tls, deadline, runtime.now) }
  local made = found[1] and found[2] and transport.new(runtime, found[2], tls ~= nil)
  job.made, job.found = made, found
  job.over:signal()
  if made then transport.own(made) end
end

--- `open` of docs/internals.md.
---@param runtime table the resty runtime
---@return moonrabbit.resty.Transport|nil, string? kind, string? text, boolean? temporary
return function(runtime, endpoint, tls, timeout)
  local job = { over = runtime.condition() }
  local thread = thread_spawn(live, job, runtime, endpoint, tls, runtime.now() + (timeout or 60))
  local ok, problem = true, nil
  if not job.found then ok, problem = pcall(job.over.wait, job.over) end
  local made, found = job.made, job.found
  if not ok then -- this task was cancelled
    if made then made:close() elseif not found then thread_kill(thread) end
    error(problem, 0)
  end
  if not found[1] then error(found[2], 0) end
  if made then return made end
  return nil, found[3], found[4], found[5]
end
