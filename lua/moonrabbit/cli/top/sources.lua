--- Where `moonrabbit top` looks: pages of metrics, and the management API. Each source has a task that looks again and
-- again; what it saw last, and why the last look failed, is there to be read at any time.

local errors = require "moonrabbit.errors"
local http = require "moonrabbit.management.http"
local protect = require "moonrabbit.protect"
local read = require "moonrabbit.metrics.read"
local values = require "moonrabbit.cli.values"

local sources = {}

-- Bytes of a page.
local MAX_PAGE = 16 * 1024 * 1024

---@class moonrabbit.cli.Source
---@field name string      for people
---@field looks integer    how many have ended
---@field now table?       the last look, when it succeeded: { at, … }
---@field before table?    the one that succeeded before it
---@field problem string?  why the last look failed
---@field err any           the same as it came: an error of the world, or words
local Source = {}
Source.__index = Source

-- ---- Pages of metrics -------------------------------------------------------------------------------

--- argparse converter: "http://host:port/path", "host:port".
function sources.address(text)
  local scheme, rest = text:match "^(%a+)://(.*)$"
  scheme = scheme and scheme:lower() or "http"
  local where, path = (rest or text):match "^([^/]*)(.*)$"
  local place = where ~= "" and not path:find "[%c ]" and values.place(where)
  if not place or scheme ~= "http" and scheme ~= "https" then
    return nil, ("'%s' is no http://host:port"):format(text)
  end
  if path == "" or path == "/" then path = "/metrics" end
  local host = place.host:find(":", 1, true) and "[" .. place.host .. "]" or place.host
  local port = place.port or 9419
  return { host = place.host, port = port, path = path, tls = scheme == "https" and { verify = true,
    server_name = place.host } or nil, label = host .. ":" .. port }
end

local function fetch(runtime, address, timeout)
  local code, headers, body = http.request {
    runtime = runtime, host = address.host, port = address.port, tls = address.tls, method = "GET",
    target = address.path, timeout = timeout, max_body = MAX_PAGE, label = address.label,
    headers = { host = address.label, accept = "text/plain", connection = "close", ["user-agent"] = "moonrabbit" },
  }
  if not code then return nil, headers end
  if code ~= 200 then
    return nil, errors.new { kind = "http", code = code,
      message = ("%s answers %d: is that where metrics are served?"):format(address.path, code) }
  end
  return body
end

local function has_ours(page)
  for name in pairs(page) do
    if name:find "^moonrabbit_" then return true end
  end
  return false
end

local function look_at_page(runtime, address, timeout)
  local body, err = fetch(runtime, address, timeout)
  if not body then return nil, err end
  local page, problem = read.page(body)
  if not page then return nil, "the answer is no page of metrics: " .. problem end
  if not has_ours(page) then return nil, "the page has no metrics of moonrabbit" end
  return { page = page }
end

--- A source of metrics.
---@param runtime table
---@param address table of sources.address
---@param timeout number
---@return moonrabbit.cli.Source
function sources.metrics(runtime, address, timeout)
  return setmetatable({
    name = address.label, looks = 0, runtime = runtime,
    ask = function() return look_at_page(runtime, address, timeout) end,
  }, Source)
end

-- ---- The management API -----------------------------------------------------------------------------

local columns = {
  "name", "messages_ready", "messages_unacknowledged", "consumers", "message_stats.publish_details.rate",
  "message_stats.deliver_get_details.rate",
}

--- A source of what the broker says of a vhost's queues.
---@param runtime table
---@param client moonrabbit.Management
---@param vhost string
---@return moonrabbit.cli.Source
function sources.management(runtime, client, vhost)
  return setmetatable({
    name = client.endpoint, looks = 0, runtime = runtime,
    ask = function()
      local queues, err = client:queues { vhost = vhost, columns = columns }
      if not queues then return nil, err end
      return { queues = queues }
    end,
  }, Source)
end

-- ---- Looking ----------------------------------------------------------------------------------------

--- Looks once.
function Source:look()
  local whole, found, err = protect(self.ask)
  if not whole then
    if found == self.runtime.cancelled and found ~= nil then error(found, 0) end
    found, err = nil, found
  end
  self.looks = self.looks + 1
  if found then
    found.at = self.runtime.now()
    self.before, self.now, self.problem, self.err = self.now or self.before, found, nil, nil
  else
    -- What was seen last still tells rates, once it is back.
    self.before, self.now, self.problem, self.err = self.now or self.before, nil, tostring(err), err
  end
end

--- Looks every so many seconds, for as long as the process runs.
function Source:keep_looking(interval)
  local runtime = self.runtime
  runtime.spawn(function()
    while true do
      local due = runtime.now() + interval
      self:look()
      runtime.sleep(math.max(0.05, due - runtime.now()))
    end
  end)
end

return sources
