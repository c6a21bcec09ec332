-- What the specs against a real broker share. The broker is the one of AMQP_URL (scripts/with-broker);
-- what needs rabbitmqctl or TLS is pending where that broker is not ours.
local moonrabbit = require "moonrabbit"

local broker = {
  url = os.getenv "AMQP_URL",
  tls_url = os.getenv "AMQPS_URL",
  tls_dir = os.getenv "MOONRABBIT_TLS_DIR",
  name = os.getenv "MOONRABBIT_BROKER",
}

--- The value, or the error thrown as a string.
function broker.ok(value, err)
  if value == nil or value == false and err ~= nil then error(tostring(err or "nil"), 2) end
  return value, err
end

--- Why specs that make and delete queues and exchanges of everyday names must not run here; nil where
--- they may: on a broker of our own, which scripts/with-broker started.
function broker.not_ours()
  if broker.name and broker.url then return nil end
  return "deletes queues such as 'hello' and 'orders': only on a private broker (scripts/with-broker)"
end

--- Why specs that need some broker cannot run; nil where they can. None is guessed.
function broker.none()
  if broker.url then return nil end
  return "needs a broker: set AMQP_URL, or use scripts/with-broker"
end

--- The `it` of a spec file: pending, for a reason, when there is one.
function broker.it_unless(it, pending, reason)
  if not reason then return it end
  return function(name) pending(name .. ": " .. reason, function() end) end
end

local serial = 0

--- A name that nothing else uses, nor has used: each spec file begins with a serial of its own.
function broker.unique(prefix)
  serial = serial + 1
  local micros = require("moonrabbit.runtime.native").now() * 1e6
  return ("spec-%s-%d-%x%x"):format(prefix or "x", serial, require("moonrabbit.net").pid(), math.floor(micros))
end

local open = {}

--- Connects; closed by broker.close_all.
function broker.connect(opts)
  local all = {}
  for key, value in pairs(opts or {}) do all[key] = value end
  if not all.uri and not all.endpoints then all.uri = broker.url end
  all.timeout = all.timeout or 15
  all.log = all.log or function(level, text)
    if level == "error" then io.stderr:write("log: ", text, "\n") end
  end
  local conn = broker.ok(moonrabbit.connect(all))
  open[#open + 1] = conn
  return conn
end

--- Closes every connection that connect made.
function broker.close_all()
  for i = #open, 1, -1 do
    open[i]:close(5)
    open[i] = nil
  end
end

--- Waits, with the event loop running, until fn returns something true; throws after `seconds`.
function broker.eventually(fn, seconds, what)
  local native = require "moonrabbit.runtime.native"
  local deadline = native.now() + (seconds or 20)
  while true do
    local result = fn()
    if result then return result end
    if native.now() > deadline then error("did not happen in time: " .. (what or "?"), 2) end
    moonrabbit.sleep(0.01)
  end
end

local function quote(text) return "'" .. tostring(text):gsub("'", "'\\''") .. "'" end

--- Runs rabbitmqctl against our broker; its output. Throws when it fails.
function broker.ctl(...)
  local words = {}
  for i, word in ipairs { ... } do words[i] = quote(word) end
  local pipe = io.popen("scripts/broker ctl --name " .. broker.name .. " " .. table.concat(words, " ")
    .. " 2>&1; echo rc=$?")
  local output = pipe:read "*a"
  pipe:close()
  local code = output:match "rc=(%d+)%s*$"
  if code ~= "0" then error("rabbitmqctl " .. table.concat({ ... }, " ") .. ": " .. output, 2) end
  return (output:gsub("rc=%d+%s*$", ""))
end

--- A client of our broker's management API.
function broker.management()
  return require "moonrabbit.management".new(os.getenv "AMQP_MANAGEMENT_URL")
end

--- The port of AMQP_URL.
function broker.parsed()
  return assert(moonrabbit.uri.parse(broker.url))
end

--- A URI of the same broker with other parts: { user, password, vhost, query }.
function broker.uri(parts)
  local p = broker.parsed()
  local function encode(text)
    return (text:gsub("[^%w]", function(c) return ("%%%02X"):format(c:byte()) end))
  end
  return ("amqp://%s:%s@%s:%d/%s%s"):format(encode(parts.user or p.user), encode(parts.password or p.password),
    parts.host or p.host, parts.port or p.port, encode(parts.vhost or p.vhost),
    parts.query and "?" .. parts.query or "")
end

return broker
