--- The management API for commands: where it is, as whom, and what an error of it means for the exit code.

local connect = require "moonrabbit.cli.connect"
local credentials = require "moonrabbit.cli.credentials"
local exit = require "moonrabbit.cli.exit"
local output = require "moonrabbit.cli.output"

local api = {}

--- Adds the option to a command.
function api.add_option(command)
  command:option "--management" :argname "<url>"
    :description("The management API: http[s]://host:port. By default MOONRABBIT_MANAGEMENT_URL, else the URL's host "
      .. "at port 15672, or 15671 with TLS; with the URL's user and password unless it has its own.")
end

local function usual_address(parsed)
  if parsed.path or parsed.srv then return nil end
  local host = parsed.host:find(":", 1, true) and "[" .. parsed.host .. "]" or parsed.host
  return parsed.tls and "https://" .. host .. ":15671" or "http://" .. host .. ":15672"
end

local function asked_for(args)
  local given = args.management or os.getenv "MOONRABBIT_MANAGEMENT_URL"
  return given ~= "" and given or nil
end

-- The broker's TLS options, which name the broker's own host unless another was given.
local function tls_of(parsed)
  local tls
  for name, value in pairs(parsed.tls or {}) do
    tls = tls or {}
    if name ~= "server_name" or value ~= parsed.host then tls[name] = value end
  end
  return tls
end

-- `parsed`: the broker that it is the API of.
local function client_at(args, address, parsed)
  local management = require "moonrabbit.management"
  local parts, problem = management.parse(address)
  if not parts then return nil, problem end
  output.secret(parts.password)
  local own = parts.user ~= nil
  return management.new {
    uri = address, timeout = args.timeout or 10,
    user = not own and parsed.user or nil, password = not own and parsed.password or nil,
    tls = parts.secure and tls_of(parsed) or nil,
  }
end

--- A client, or nil and what is wrong. `parsed`: the broker; that of the arguments by default.
function api.client(args, parsed)
  if not parsed then
    local options
    options, parsed = credentials.resolve(args)
    if not options then return nil, parsed end
  end
  local address = asked_for(args) or usual_address(parsed)
  if not address then return nil, "the URL does not tell where the management API is: say it with --management" end
  local client, problem = client_at(args, address, parsed)
  return client, problem
end

--- Adds the option to a command that does without the API where nobody tells where it is. `what`: what it is for.
function api.add_choice(command, what)
  command:option "--management" :argname "<url>"
    :description("The management API, http[s]://host:port, " .. what .. ". By default MOONRABBIT_MANAGEMENT_URL, else "
      .. "it is not asked; with the app's user and password unless the URL has its own.")
end

--- A client of the API of an app's broker; false where it is not asked for; nil and what is wrong. `given`: the app's
--- options of connect.
---@return moonrabbit.Management|false|nil, string? problem
function api.of_app(args, given)
  local address = asked_for(args)
  if not address then return false end
  local parsed, problem = require("moonrabbit.cli.app_connection").first(given)
  if not parsed then return nil, problem end
  local client
  client, problem = client_at(args, address, parsed)
  return client, problem
end

--- A client, or nil and an exit code, with the complaint made.
function api.open(args)
  local client, problem = api.client(args)
  if client then return client end
  output.complain(problem)
  return nil, exit.usage
end

--- Complains about an error and returns its exit code.
function api.fail(err) return connect.fail(err, true) end

return api
