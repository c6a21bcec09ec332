--- Policies: what applies to every queue or exchange whose name fits a pattern.
-- https://www.rabbitmq.com/docs/parameters#policies
-- @module moonrabbit.management

local options = require "moonrabbit.options"

local argument, check = options.argument, options.check
local shortstr, text = options.shortstr, options.string

---@class moonrabbit.Management
local Management = {}

--- GET /api/policies
---@param vhost string? of one vhost
---@return table[]|nil, moonrabbit.Error?
function Management:policies(vhost)
  if vhost ~= nil then argument("Management:policies", "vhost", vhost, shortstr) end
  return self:_get({ "policies", vhost }, nil, "list")
end

--- GET /api/policies/VHOST/NAME
---@param vhost string
---@param name string
---@return table|nil, moonrabbit.Error?
function Management:policy(vhost, name)
  argument("Management:policy", "vhost", vhost, shortstr)
  argument("Management:policy", "name", name, shortstr)
  return self:_get({ "policies", vhost, name }, nil, "object")
end

---@class moonrabbit.PolicyOptions
---@field pattern string      a regular expression (of Erlang, that is PCRE); "^orders\\." for names that begin so
---@field definition table    such as { ["max-length"] = 1000 }
---@field priority integer?   the highest of those that fit a name counts; 0 by default
---@field apply_to string?    "all" (the default), "queues", "exchanges"; later brokers also "classic_queues", "quorum_queues", "streams"

local policy_options = {
  pattern = text, definition = options.table, priority = options.integer(-2147483648, 2147483647),
  apply_to = options.one_of("all", "queues", "exchanges", "classic_queues", "quorum_queues", "streams"),
}

local function set(self, vhost, name, opts)
  return self:_change("PUT", { "policies", vhost, name }, {
    pattern = opts.pattern, definition = opts.definition, priority = opts.priority or 0,
    ["apply-to"] = opts.apply_to or "all",
  }, nil, 3)
end

--- PUT /api/policies/VHOST/NAME: sets it, or replaces it. Queues take it within moments.
---@param vhost string
---@param name string
---@param opts moonrabbit.PolicyOptions
---@return true|nil, moonrabbit.Error?
function Management:set_policy(vhost, name, opts)
  argument("Management:set_policy", "vhost", vhost, shortstr)
  argument("Management:set_policy", "name", name, shortstr)
  opts = check("Management:set_policy", opts, policy_options)
  argument("Management:set_policy", "option 'pattern'", opts.pattern, text)
  argument("Management:set_policy", "option 'definition'", opts.definition, options.table)
  return set(self, vhost, name, opts)
end

--- DELETE /api/policies/VHOST/NAME
---@param vhost string
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:delete_policy(vhost, name)
  argument("Management:delete_policy", "vhost", vhost, shortstr)
  argument("Management:delete_policy", "name", name, shortstr)
  return self:_change("DELETE", { "policies", vhost, name })
end

-- ---- Mirrored queues --------------------------------------------------------------------------------

---@class moonrabbit.MirrorOptions
---@field pattern string    of the queues' names
---@field mode string?      "all" (the default): on every node; "exactly": on `count` nodes; "nodes": on `nodes`
---@field count integer?    of "exactly": the master counts too
---@field nodes string[]?   of "nodes": "rabbit@host"
---@field sync string?      "automatic" (the default): a new mirror gets what is in the queue, which stands still meanwhile; "manual": only what comes from then on
---@field batch integer?    ha-sync-batch-size
---@field promote string?   ha-promote-on-shutdown: "when-synced" or "always"
---@field priority integer? of the policy
---@field definition table? more of the policy's definition

local mirror_options = {
  pattern = text, mode = options.one_of("all", "exactly", "nodes"), count = options.integer(1, 1000),
  nodes = options.table, sync = options.one_of("automatic", "manual"), batch = options.integer(1, 2147483647),
  promote = options.one_of("when-synced", "always"), priority = options.integer(-2147483648, 2147483647),
  definition = options.table,
}

local function mirror_params(opts)
  local mode = opts.mode or "all"
  if mode ~= "exactly" and opts.count then error("Management:mirror: option 'count' is for mode \"exactly\"", 3) end
  if mode ~= "nodes" and opts.nodes then error("Management:mirror: option 'nodes' is for mode \"nodes\"", 3) end
  if mode == "exactly" then
    if not opts.count then error("Management:mirror: mode \"exactly\" needs the option 'count'", 3) end
    return mode, opts.count
  elseif mode == "nodes" then
    if not opts.nodes or type(opts.nodes[1]) ~= "string" then
      error("Management:mirror: mode \"nodes\" needs the option 'nodes', a list of node names", 3)
    end
    return mode, opts.nodes
  end
  return mode, nil
end

--- Sets a policy that mirrors classic queues (ha-mode, ha-params, ha-sync-mode). RabbitMQ 4.0 and later have no
--- mirrored queues, and answer with an `http` error: declare quorum queues there.
--- https://www.rabbitmq.com/docs/3.13/ha
---@param vhost string
---@param name string   of the policy
---@param opts moonrabbit.MirrorOptions
---@return true|nil, moonrabbit.Error?
function Management:mirror(vhost, name, opts)
  argument("Management:mirror", "vhost", vhost, shortstr)
  argument("Management:mirror", "name", name, shortstr)
  opts = check("Management:mirror", opts, mirror_options)
  argument("Management:mirror", "option 'pattern'", opts.pattern, text)
  local definition = {}
  for key, value in pairs(opts.definition or {}) do definition[key] = value end
  definition["ha-mode"], definition["ha-params"] = mirror_params(opts)
  definition["ha-sync-mode"] = opts.sync or "automatic"
  definition["ha-sync-batch-size"] = opts.batch
  definition["ha-promote-on-shutdown"] = opts.promote
  return set(self, vhost, name, {
    pattern = opts.pattern, definition = definition, priority = opts.priority, apply_to = "queues",
  })
end

return Management
