--- Runtime parameters, and what is made of them: federation upstreams and shovels.
-- https://www.rabbitmq.com/docs/parameters
-- @module moonrabbit.management

local options = require "moonrabbit.options"

local argument = options.argument
local shortstr, text = options.shortstr, options.string

---@class moonrabbit.Management
local Management = {}

--- GET /api/parameters/COMPONENT/VHOST
---@param component string?  such as "federation-upstream"; all by default
---@param vhost string?
---@return table[]|nil, moonrabbit.Error?
function Management:parameters(component, vhost)
  if component ~= nil then argument("Management:parameters", "component", component, text) end
  if vhost ~= nil then argument("Management:parameters", "vhost", vhost, shortstr) end
  return self:_get({ "parameters", component, component and vhost }, nil, "list")
end

local function set(self, component, vhost, name, value)
  return self:_change("PUT", { "parameters", component, vhost, name }, {
    component = component, vhost = vhost, name = name, value = value,
  }, nil, 3)
end

--- PUT /api/parameters/COMPONENT/VHOST/NAME
---@param component string
---@param vhost string
---@param name string
---@param value any
---@return true|nil, moonrabbit.Error?
function Management:set_parameter(component, vhost, name, value)
  argument("Management:set_parameter", "component", component, text)
  argument("Management:set_parameter", "vhost", vhost, shortstr)
  argument("Management:set_parameter", "name", name, shortstr)
  return set(self, component, vhost, name, value)
end

--- DELETE /api/parameters/COMPONENT/VHOST/NAME
---@param component string
---@param vhost string
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:delete_parameter(component, vhost, name)
  argument("Management:delete_parameter", "component", component, text)
  argument("Management:delete_parameter", "vhost", vhost, shortstr)
  argument("Management:delete_parameter", "name", name, shortstr)
  return self:_change("DELETE", { "parameters", component, vhost, name })
end

-- ---- Federation -------------------------------------------------------------------------------------

--- The upstreams of a vhost. Needs the plugin rabbitmq_federation_management, as all about federation here; their
--- URIs hold passwords. https://www.rabbitmq.com/docs/federation
---@param vhost string?
---@return table[]|nil, moonrabbit.Error?
function Management:federation_upstreams(vhost)
  if vhost ~= nil then argument("Management:federation_upstreams", "vhost", vhost, shortstr) end
  return self:_get({ "parameters", "federation-upstream", vhost }, nil, "list")
end

--- Sets an upstream. A policy then names the exchanges or queues that it feeds, with the definition
--- { ["federation-upstream"] = name } or { ["federation-upstream-set"] = "all" }.
--- https://www.rabbitmq.com/docs/federation-reference
---@param vhost string
---@param name string
---@param definition table<string, any>   { uri = "amqp://…" or a list of them, … }
---@return true|nil, moonrabbit.Error?
function Management:set_federation_upstream(vhost, name, definition)
  argument("Management:set_federation_upstream", "vhost", vhost, shortstr)
  argument("Management:set_federation_upstream", "name", name, shortstr)
  argument("Management:set_federation_upstream", "definition", definition, options.table)
  if definition.uri == nil then error("Management:set_federation_upstream: the definition lacks the uri", 2) end
  return set(self, "federation-upstream", vhost, name, definition)
end

--- Deletes an upstream.
---@param vhost string
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:delete_federation_upstream(vhost, name)
  argument("Management:delete_federation_upstream", "vhost", vhost, shortstr)
  argument("Management:delete_federation_upstream", "name", name, shortstr)
  return self:_change("DELETE", { "parameters", "federation-upstream", vhost, name })
end

--- GET /api/federation-links: each link with its `status`: "starting", "running", "shutdown", …
---@param vhost string?
---@return table[]|nil, moonrabbit.Error?
function Management:federation_links(vhost)
  if vhost ~= nil then argument("Management:federation_links", "vhost", vhost, shortstr) end
  return self:_get({ "federation-links", vhost }, nil, "list")
end

-- ---- Shovels ----------------------------------------------------------------------------------------

--- GET /api/shovels: each shovel with its `state`. Needs the plugin rabbitmq_shovel_management, as all about
--- shovels here. https://www.rabbitmq.com/docs/shovel
---@param vhost string?
---@return table[]|nil, moonrabbit.Error?
function Management:shovels(vhost)
  if vhost ~= nil then argument("Management:shovels", "vhost", vhost, shortstr) end
  return self:_get({ "shovels", vhost }, nil, "list")
end

--- Sets a dynamic shovel, which starts at once. https://www.rabbitmq.com/docs/shovel-dynamic
---@param vhost string
---@param name string
---@param definition table<string, any>   { ["src-uri"] = …, ["src-queue"] = …, ["dest-uri"] = …, ["dest-queue"] = …, … }
---@return true|nil, moonrabbit.Error?
function Management:set_shovel(vhost, name, definition)
  argument("Management:set_shovel", "vhost", vhost, shortstr)
  argument("Management:set_shovel", "name", name, shortstr)
  argument("Management:set_shovel", "definition", definition, options.table)
  for _, field in ipairs { "src-uri", "dest-uri" } do
    if definition[field] == nil then error("Management:set_shovel: the definition lacks '" .. field .. "'", 2) end
  end
  return set(self, "shovel", vhost, name, definition)
end

--- Deletes a dynamic shovel, which ends it.
---@param vhost string
---@param name string
---@return true|nil, moonrabbit.Error?
function Management:delete_shovel(vhost, name)
  argument("Management:delete_shovel", "vhost", vhost, shortstr)
  argument("Management:delete_shovel", "name", name, shortstr)
  return self:_change("DELETE", { "parameters", "shovel", vhost, name })
end

return Management
