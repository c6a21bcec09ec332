--- Certificates made by openssl in a folder of their own, and `openssl s_server` to speak to.

local ports = require "support.ports"

local M = {}

local function execute(command)
  local ok, _, code = os.execute("{ " .. command .. "; } >/dev/null 2>&1")
  return ok == true and (code == nil or code == 0) or ok == 0
end

local EXTENSIONS = "basicConstraints=critical,CA:FALSE\\nsubjectAltName=%s\\n"
local NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"

local function authority(folder, name)
  assert(execute(("cd %s && openssl req -x509 %s -days 2 -subj /CN=%s -keyout %s.key -out %s.pem")
    :format(folder, NEW_KEY, name, name, name)), "openssl makes " .. name)
end

local function leaf(folder, ca, name, names)
  assert(execute(("cd %s && openssl req %s -subj /CN=%s -keyout %s.key -out %s.csr && "
    .. "printf '" .. EXTENSIONS .. "' > %s.ext && "
    .. "openssl x509 -req -in %s.csr -CA %s.pem -CAkey %s.key -CAcreateserial -days 2 "
    .. "-extfile %s.ext -out %s.pem"):format(folder, NEW_KEY, name, name, name, names, name,
    name, ca, ca, name, name)), "openssl makes " .. name)
end

--- ca.pem signs server (localhost, 127.0.0.1), other (rabbit.example), client and loud (a name with an escape
--- sequence and many more) and partial (r*.rabbit.example); stranger.pem is another authority.
---@return string folder
function M.certificates()
  local folder = os.tmpname()
  os.remove(folder)
  assert(execute("mkdir " .. folder))
  authority(folder, "ca")
  authority(folder, "stranger")
  leaf(folder, "ca", "server", "DNS:localhost,IP:127.0.0.1")
  leaf(folder, "ca", "other", "DNS:rabbit.example,DNS:*.rabbit.example")
  leaf(folder, "ca", "client", "DNS:client")
  leaf(folder, "ca", "partial", "DNS:r*.rabbit.example")
  leaf(folder, "ca", "loud", "DNS:red\\033[31m.example,IP:::1" .. (",DNS:" .. ("x"):rep(50) .. ".example"):rep(20))
  assert(execute(("cd %s && openssl ec -aes128 -passout pass:secret -in client.key -out locked.key")
    :format(folder)))
  return folder
end

function M.remove(folder)
  assert(folder:match("^/tmp/"))
  execute("rm -rf " .. folder)
end

--- Starts an s_server that sends every line back reversed.
---@param folder string of `certificates`
---@param certificate string "server" or "other"
---@param options string? more arguments
---@return { port: integer, line: fun(): string?, stop: function }
function M.server(folder, certificate, options)
  local port = ports.free()
  local pipe = assert(io.popen(("echo $$; cd %s && exec timeout -k 1 120 openssl s_server -accept 127.0.0.1:%d "
    .. "-cert %s.pem -key %s.key -rev %s 2>&1 </dev/null"):format(folder, port, certificate,
    certificate, options or "")))
  local pid = assert(tonumber(pipe:read("*l")))
  local line
  repeat line = pipe:read("*l") until not line or line:match("^ACCEPT")
  assert(line, "s_server does not start")
  local server = { port = port, line = function() return pipe:read "*l" end } -- the next that it says
  function server.stop()
    if not pipe then return end
    execute("kill " .. pid)
    pipe:close()
    pipe = nil
  end
  return server
end

return M
