--- The management API's view of the cluster: nodes, vhosts, connections, health.
-- @module moonrabbit.management

local options = require "moonrabbit.options"

local argument, check = options.argument, options.check
local text, shortstr = options.string, options.shortstr

---@class moonrabbit.Management
local Management = {}

--- GET /api/overview: version, name of the cluster, totals, and for monitoring users the listeners of every node.
---@return table|nil, moonrabbit.Error?
function Management:overview()
  return self:_get({ "overview" }, nil, "object")
end

--- GET /api/nodes: { name, running, … } of each node of the cluster.
---@return table[]|nil, moonrabbit.Error?
function Management:nodes()
  return self:_get({ "nodes" }, nil, "list")
end

--- GET /api/nodes/NAME
---@param name string   such as "rabbit@host"
---@return table|nil, moonrabbit.Error?
function Management:node(name)
  argument("Management:node", "name", name, text)
  return self:_get({ "nodes", name }, nil, "object")
end

-- ---- Virtual hosts ----------------------------------------------------------------------------------

--- GET /api/vhosts: those that the user may see.
---@return table[]|nil, moonrabbit.Error?
function Management:vhosts()
  return self:_get({ "vhosts" }, nil, "list")
end

---@class moonrabbit.VhostOptions
---@field description string?         for people
---@field tags string?                with commas between
---@field default_queue_type string?  of RabbitMQ 3.11 and later: "classic", "quorum" or "stream"
---@field tracing boolean?            the firehose: https://www.rabbitmq.com/docs/firehose

local vhost_options = {
  description = text, tags = text, default_queue_type = text, tracing = options.boolean,
}

--- PUT /api/vhosts/NAME: makes it, or changes what `opts` says of it.
---@param name string
---@param opts moonrabbit.VhostOptions?
---@return true|nil, moonrabbit.Error?
function Management:set_vhost(name, opts)
  argument("Management:set_vhost", "name", name, shortstr)
  opts = check("Management:set_vhost", opts, vhost_options)
  return self:_change("PUT", { "vhosts", name }, {
    description = opts.description, tags = opts.tags, default_queue_type = opts.default_queue_type,
    tracing = opts.tracing,
  })
end

--- DELETE /api/vhosts/NAME: with all its queues and what is in them.
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:delete_vhost(name)
  argument("Management:delete_vhost", "name", name, shortstr)
  return self:_change("DELETE", { "vhosts", name })
end

-- ---- Connections ------------------------------------------------------------------------------------

--- GET /api/connections: those whose statistics have come, which takes a few seconds after they open.
---@param vhost string? of one vhost
---@return table[]|nil, moonrabbit.Error?
function Management:connections(vhost)
  if vhost == nil then return self:_pages { "connections" } end
  argument("Management:connections", "vhost", vhost, shortstr)
  return self:_get({ "vhosts", vhost, "connections" }, nil, "list") -- the broker has no pages of these
end

--- DELETE /api/connections/NAME: the broker closes it, with code 320.
---@param name string      as in `connections`: "127.0.0.1:40000 -> 127.0.0.1:5672"
---@param reason string?   what its client is told
---@return true|nil, moonrabbit.Error?
function Management:close_connection(name, reason)
  argument("Management:close_connection", "name", name, text)
  if reason ~= nil then argument("Management:close_connection", "reason", reason, text) end
  return self:_change("DELETE", { "connections", name }, nil, { headers = { ["x-reason"] = reason } })
end

--- GET /api/channels
---@return table[]|nil, moonrabbit.Error?
function Management:channels()
  return self:_pages { "channels" }
end

--- GET /api/consumers: who consumes from which queue.
---@param vhost string? of one vhost
---@return table[]|nil, moonrabbit.Error?
function Management:consumers(vhost)
  if vhost == nil then return self:_get({ "consumers" }, nil, "list") end
  argument("Management:consumers", "vhost", vhost, shortstr)
  return self:_get({ "consumers", vhost }, nil, "list")
end

-- ---- Health -----------------------------------------------------------------------------------------

--- GET /api/health/checks/NAME/…: true when the check passes. One that fails is an `http` error with code 503 and
--- the broker's reason. https://www.rabbitmq.com/docs/monitoring#health-checks
---@param name string  "alarms" (of the cluster), "local-alarms", "virtual-hosts", "node-is-quorum-critical", "node-is-mirror-sync-critical", "port-listener" (port), "protocol-listener" (protocol), "certificate-expiration" (number, unit)
---@param ... string|integer  what the check takes
---@return true|nil, moonrabbit.Error?
function Management:health(name, ...)
  argument("Management:health", "name", name, text)
  local path = { "health", "checks", name, ... }
  local answer, err = self:_get(path, nil, "object")
  if answer then return true end
  if err.code == 503 then err.message = err.message:gsub("^.-: the management API refuses", "health check " .. name) end
  return nil, err
end

return Management
